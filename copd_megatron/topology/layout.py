"""Which global rank does what: pure arithmetic, no torch.

Branches take contiguous ranges of global ranks, in the order of ``branches``. Inside a branch, ranks follow
Megatron-Core's default order ``tp-cp-ep-dp-pp``: tensor fastest, then context, then data, pipeline slowest.
Sampling divides the same ranks a second time, with rollout tensor parallelism fastest:

    branch_rank = tp + TP * (cp + CP * (dp + DP * pp)) = rollout_tp_rank + ROLLOUT_TP * rollout_replica

Worked example: TP 2, DP 2, rollout TP 1: branch rank 3 is tp 1, dp 1, pp 0, and rollout replica 3 of 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from copd_megatron.config.schema import BranchConfig, Config, ParallelConfig


@dataclass(frozen=True, kw_only=True)
class Place:
    """One process: its place in the job, in its branch, and in the two divisions of its branch."""

    rank: int
    """Global rank."""
    branch: str
    branch_rank: int
    tp_rank: int
    cp_rank: int
    dp_rank: int
    pp_rank: int
    rollout_replica: int
    rollout_tp_rank: int


@dataclass(frozen=True, kw_only=True)
class BranchLayout:
    """A branch's ranks and parallel sizes."""

    name: str
    first_rank: int
    """Global rank of its branch rank 0."""
    tensor_parallel_size: int
    pipeline_parallel_size: int
    context_parallel_size: int
    data_parallel_size: int
    rollout_tensor_parallel_size: int
    frozen: bool = False

    @property
    def world_size(self) -> int:
        return (
            self.tensor_parallel_size
            * self.context_parallel_size
            * self.data_parallel_size
            * self.pipeline_parallel_size
        )

    @property
    def ranks(self) -> range:
        """The branch's global ranks."""
        return range(self.first_rank, self.first_rank + self.world_size)

    @property
    def num_rollout_replicas(self) -> int:
        return self.world_size // self.rollout_tensor_parallel_size

    def place(self, branch_rank: int) -> Place:
        """The process at ``branch_rank``. Raises IndexError outside the branch."""
        if not 0 <= branch_rank < self.world_size:
            raise IndexError(f"{self.name!r} has branch ranks 0..{self.world_size - 1}, not {branch_rank}")
        rest, tp_rank = divmod(branch_rank, self.tensor_parallel_size)
        rest, cp_rank = divmod(rest, self.context_parallel_size)
        pp_rank, dp_rank = divmod(rest, self.data_parallel_size)
        replica, rollout_tp_rank = divmod(branch_rank, self.rollout_tensor_parallel_size)
        return Place(
            rank=self.first_rank + branch_rank,
            branch=self.name,
            branch_rank=branch_rank,
            tp_rank=tp_rank,
            cp_rank=cp_rank,
            dp_rank=dp_rank,
            pp_rank=pp_rank,
            rollout_replica=replica,
            rollout_tp_rank=rollout_tp_rank,
        )

    def branch_rank_of(
        self, *, tp_rank: int = 0, cp_rank: int = 0, dp_rank: int = 0, pp_rank: int = 0
    ) -> int:
        """The branch rank at these coordinates; the inverse of ``place``. Raises IndexError outside the
        branch."""
        for name, value, size in (
            ("tp_rank", tp_rank, self.tensor_parallel_size),
            ("cp_rank", cp_rank, self.context_parallel_size),
            ("dp_rank", dp_rank, self.data_parallel_size),
            ("pp_rank", pp_rank, self.pipeline_parallel_size),
        ):
            if not 0 <= value < size:
                raise IndexError(f"branch {self.name!r}: {name} {value} is outside 0..{size - 1}")
        rest = dp_rank + self.data_parallel_size * pp_rank
        return tp_rank + self.tensor_parallel_size * (cp_rank + self.context_parallel_size * rest)


@dataclass(frozen=True)
class Layout:
    """The whole job: its branches, in rank order."""

    branches: Mapping[str, BranchLayout]

    @classmethod
    def from_config(cls, config: Config) -> Layout:
        """Lays the branches of a validated config side by side.

        Raises:
            ValueError: there is no branch, or one whose rollout tensor parallelism does not divide its ranks.
        """
        branches: dict[str, BranchLayout] = {}
        first_rank = 0
        for name, branch in config.branches.items():
            branches[name] = _branch_layout(name, branch, first_rank)
            first_rank += branches[name].world_size
        if not branches:
            raise ValueError("branches: empty; name at least one branch")
        return cls(branches=branches)

    @property
    def world_size(self) -> int:
        return sum(branch.world_size for branch in self.branches.values())

    @property
    def branch_names(self) -> tuple[str, ...]:
        return tuple(self.branches)

    def branch_of(self, rank: int) -> str:
        """The branch that global ``rank`` belongs to. Raises IndexError outside the job."""
        for name, branch in self.branches.items():
            if rank in branch.ranks:
                return name
        raise IndexError(f"the job has ranks 0..{self.world_size - 1}, not {rank}")

    def ranks_of(self, branch: str) -> range:
        """Global ranks of a branch. Raises KeyError if there is no such branch."""
        return self._branch(branch).ranks

    def place(self, rank: int) -> Place:
        """Everything about one global rank. Raises IndexError outside the job."""
        branch = self.branches[self.branch_of(rank)]
        return branch.place(rank - branch.first_rank)

    def places(self) -> Iterator[Place]:
        """All processes, in order of global rank."""
        return (self.place(rank) for rank in range(self.world_size))

    def describe(self, max_ranks_per_branch: int = 64) -> str:
        """The layout as a table for people. Branches with many ranks are shortened in the middle."""
        lines = []
        for branch in self.branches.values():
            frozen = ", frozen" if branch.frozen else ""
            lines.append(
                f"{branch.name}: ranks {branch.ranks[0]}..{branch.ranks[-1]} ({branch.world_size}), "
                f"tp {branch.tensor_parallel_size} x cp {branch.context_parallel_size} x "
                f"dp {branch.data_parallel_size} x pp {branch.pipeline_parallel_size}; rollout "
                f"tp {branch.rollout_tensor_parallel_size} x {branch.num_rollout_replicas} replicas{frozen}"
            )
        header = ("rank", "branch", "branch rank", "tp", "cp", "dp", "pp", "rollout replica", "rollout tp")
        rows: list[tuple[str, ...]] = [header]
        for branch in self.branches.values():
            rows.extend(_shown_rows(branch, max_ranks_per_branch))
        return "\n".join([*lines, "", *_table(rows)])

    def _branch(self, name: str) -> BranchLayout:
        if name not in self.branches:
            raise KeyError(f"{name!r} is not a branch; branches: {', '.join(self.branches)}")
        return self.branches[name]


def _branch_layout(name: str, branch: BranchConfig, first_rank: int) -> BranchLayout:
    parallel: ParallelConfig = branch.parallel
    ranks, rollout_tp = parallel.world_size, branch.rollout.tensor_parallel_size
    if ranks < 1 or rollout_tp < 1 or ranks % rollout_tp:
        raise ValueError(
            f"branches.{name}: rollout.tensor_parallel_size {rollout_tp} does not divide its {ranks} ranks"
        )
    return BranchLayout(
        name=name,
        first_rank=first_rank,
        tensor_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_parallel_size=parallel.pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        data_parallel_size=parallel.data_parallel_size,
        rollout_tensor_parallel_size=rollout_tp,
        frozen=branch.frozen,
    )


def _shown_rows(branch: BranchLayout, limit: int) -> list[tuple[str, ...]]:
    rows = []
    for branch_rank in range(branch.world_size):
        if branch.world_size > limit and limit // 2 <= branch_rank < branch.world_size - limit // 2:
            if branch_rank == limit // 2:
                rows.append(("...", branch.name, *["..."] * 7))
            continue
        place = branch.place(branch_rank)
        numbers = (
            place.branch_rank,
            place.tp_rank,
            place.cp_rank,
            place.dp_rank,
            place.pp_rank,
            place.rollout_replica,
            place.rollout_tp_rank,
        )
        rows.append((str(place.rank), place.branch, *map(str, numbers)))
    return rows


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    """Left-aligned columns, two spaces apart."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
