"""One torchrun world divided into branch worlds, and a router group over all ranks.

Each branch is an ordinary torch.distributed world: its default process group spans its ranks alone, made over
``PrefixStore("branch/<name>")``. So Megatron-Core's ``parallel_state`` and vLLM's external launcher work
unchanged, and branches may differ in size and layout. The router group is a ``ProcessGroupGloo`` over all
ranks that torch.distributed does not know as a group: use its own methods (``send``, ``recv``, ``barrier``,
``allgather``), with global ranks and CPU tensors.

The store is torchrun's (``TORCHELASTIC_USE_AGENT_STORE``). Under another launcher that sets RANK, WORLD_SIZE,
LOCAL_RANK, MASTER_ADDR and MASTER_PORT, global rank 0 serves it at MASTER_ADDR alone. Gloo uses the interface
that leads there, unless GLOO_SOCKET_IFNAME names one: a job whose MASTER_ADDR is 127.0.0.1 can be reached
from its own machine only. Keys contain the run's identifier and torchrun's restart count, so that a restarted
group never reads those of its predecessor.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self

import torch
import torch.distributed as dist

from copd_megatron.errors import is_hopeless
from copd_megatron.topology.agreement import WorldError, agree
from copd_megatron.topology.collectives import all_gather_messages
from copd_megatron.topology.gloo import INTERFACE, RouterGroup, connect_lazily, gloo_group, is_lazy
from copd_megatron.topology.store import interface_to, reach_store, serve_store
from copd_megatron.topology.watch import Watch

logger = logging.getLogger(__name__)

_BACKEND_GRACE_SECONDS: Final = 60.0
"""Backends time out later than the watch, because its report says more."""
_ENVIRONMENT: Final = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class World:
    """This process's place in the job, and the groups it talks through. Made by ``init_world``."""

    rank: int
    """Global rank."""
    world_size: int
    """Ranks of all branches."""
    branch: str
    branch_rank: int
    branch_ranks: dict[str, tuple[int, ...]]
    """Branch name to global ranks, for every branch, in configuration order."""
    device: torch.device
    """``cpu``, or ``cuda:<LOCAL_RANK>``."""
    store: dist.Store
    """The job's store under this run's prefix. For use by one thread: ``clone()`` it for another."""
    router: RouterGroup
    """Gloo group over all ranks, for CPU tensors; peers are global ranks."""
    watch: Watch
    local_rank: int
    hosts_store: bool
    _saved_environment: dict[str, str | None] = field(default_factory=dict)
    """Variables as they were before this object changed them; None: not set."""
    _closed: bool = False

    @property
    def branch_size(self) -> int:
        return len(self.branch_ranks[self.branch])

    @property
    def branches(self) -> tuple[str, ...]:
        return tuple(self.branch_ranks)

    @property
    def is_first(self) -> bool:
        """Global rank 0, which writes what the job writes once."""
        return self.rank == 0

    @property
    def is_branch_first(self) -> bool:
        """First rank of its branch, which writes what a branch writes once."""
        return self.branch_rank == 0

    def place_of(self, rank: int) -> tuple[str, int]:
        """Branch and branch rank of a global rank."""
        for branch, ranks in self.branch_ranks.items():
            if rank in ranks:
                return branch, ranks.index(rank)
        raise ValueError(f"no rank {rank} in a world of {self.world_size}")

    def barrier(self, name: str) -> None:
        """Waits until every rank of every branch is here. Reports call it ``name``."""
        with self.watch.operation(f"barrier {name}"):
            self.router.barrier().wait()

    def all_gather_objects(self, obj: Any, name: str = "all_gather_objects") -> list[Any]:
        """Small values of all ranks, by global rank, on every rank. ``messages`` says what they may hold."""

        def all_gather(parts: list[torch.Tensor], part: torch.Tensor) -> None:
            self.router.allgather([parts], [part]).wait()

        def broadcast(tensor: torch.Tensor, source: int) -> None:
            options = dist.BroadcastOptions()
            options.rootRank, options.rootTensor = source, 0
            self.router.broadcast([tensor], options).wait()

        with self.watch.operation(name):
            return all_gather_messages(
                obj, num_ranks=self.world_size, all_gather=all_gather, broadcast=broadcast
            )

    def branch_gather(self, obj: Any, name: str = "branch_gather") -> list[Any]:
        """Small values of this branch's ranks, by branch rank, on every one of them; as
        ``all_gather_objects``."""
        with self.watch.operation(name, ranks=self.branch_ranks[self.branch]):
            return all_gather_messages(obj)

    def branch_environment(self) -> dict[str, str]:
        """RANK, WORLD_SIZE and LOCAL_RANK as libraries inside a branch must read them.

        RANK and WORLD_SIZE are the branch's: vLLM's external launcher takes its rank from RANK, and
        Megatron-Core falls back on both. LOCAL_RANK stays the launcher's, since it is the index of the device
        on this node.
        """
        return {
            "RANK": str(self.branch_rank),
            "WORLD_SIZE": str(self.branch_size),
            "LOCAL_RANK": str(self.local_rank),
        }

    def adopt_branch_environment(self) -> None:
        """Puts ``branch_environment()`` into ``os.environ`` until ``close()``."""
        for name, value in self.branch_environment().items():
            self._saved_environment.setdefault(name, os.environ[name])
            os.environ[name] = value

    def _restore_environment(self) -> None:
        for name, value in self._saved_environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    def close(self) -> None:
        """Leaves in good order: waits for everybody, stops the watch, destroys the groups. Safe to call
        twice."""
        if self._closed:
            return
        self._closed = True
        self.barrier("close")
        self.watch.close()
        dist.destroy_process_group()
        self._restore_environment()
        if self.hosts_store:
            # the server lives in this process, and the others still have to say that they have left
            others = [f"closed/{rank}" for rank in range(self.world_size) if rank != self.rank]
            self.store.wait(others, timedelta(seconds=self.watch.timeout_seconds))
        else:
            self.store.set(f"closed/{self.rank}", "")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            # the others cannot be waited for; they learn of it from the watch and from closed connections
            self._closed = True
            if is_hopeless(error):
                # the launcher ends all ranks when the first has gone, and this one still has to say why
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self.watch.fail(f"{type(error).__name__}: {error}" if is_hopeless(error) else None)
            self._restore_environment()


def init_world(
    branch_ranks: Mapping[str, Sequence[int]],
    *,
    device: Literal["cpu", "cuda"],
    timeout_seconds: float,
    run_id: str,
    report_dir: Path | None = None,
) -> World:
    """Joins the job: the branch's world as torch.distributed's default group, the router group, the watch.

    Collective over all launched ranks. Reads the launcher's environment (RANK, WORLD_SIZE, LOCAL_RANK,
    MASTER_ADDR, MASTER_PORT). On CUDA, the branch's group has a Gloo part for CPU tensors.

    Args:
        branch_ranks: branch name to global ranks; together exactly 0 .. WORLD_SIZE - 1.
        device: where the actors run; ``cuda`` selects the GPU of LOCAL_RANK.
        timeout_seconds: limit on every operation, and on waiting for ranks to start.
        run_id: the same on every rank; keeps runs apart that share a store.
        report_dir: where the watch also writes its reports.

    Raises:
        ValueError: ``branch_ranks`` does not cover the world.
        WorldError: no launcher environment, a store that cannot be served or reached, ranks that never came,
            or ranks with another configuration.
    """
    rank, world_size, local_rank = _launcher_environment()
    if dist.is_initialized():
        raise WorldError("torch.distributed is initialised already; init_world must be the one to do it")
    ranks = {branch: tuple(branch_ranks[branch]) for branch in branch_ranks}
    _check_cover(ranks, world_size)
    branch = next(name for name, members in ranks.items() if rank in members)
    timeout = timedelta(seconds=timeout_seconds + _BACKEND_GRACE_SECONDS)

    changed = _choose_interface(os.environ["MASTER_ADDR"]) | connect_lazily(world_size)
    store, hosts_store = _connect(rank, timeout)
    agree(store, rank, ranks, run_id, timeout_seconds)
    store = dist.PrefixStore(run_id, store)
    if device == "cuda":
        torch.cuda.set_device(local_rank)
    watch = Watch(
        store, rank, ranks, timeout_seconds=timeout_seconds, report_dir=report_dir, hosts_store=hosts_store,
        store_rank=None if _launcher_serves() else 0,
    )  # fmt: skip
    try:
        with watch.operation(f"init_world branch {branch}", ranks=ranks[branch]):
            dist.init_process_group(
                backend="cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
                store=dist.PrefixStore(f"branch/{branch}", store),
                rank=ranks[branch].index(rank),
                world_size=len(ranks[branch]),
                timeout=timeout,
            )
        with watch.operation("init_world router"):
            router = gloo_group(
                dist.PrefixStore("router", store), rank, world_size, timeout, lazy=is_lazy(world_size)
            )
    except BaseException:
        watch.fail()
        raise
    world = World(
        rank=rank,
        world_size=world_size,
        branch=branch,
        branch_rank=ranks[branch].index(rank),
        branch_ranks=ranks,
        device=torch.device("cuda", local_rank) if device == "cuda" else torch.device("cpu"),
        store=store,
        router=router,
        watch=watch,
        local_rank=local_rank,
        hosts_store=hosts_store,
        _saved_environment=changed,
    )
    world.barrier("init_world")
    logger.info(
        "rank %d of %d: branch %s, rank %d of %d, %s",
        rank, world_size, branch, world.branch_rank, world.branch_size, world.device,
    )  # fmt: skip
    return world


def _launcher_environment() -> tuple[int, int, int]:
    missing = [name for name in _ENVIRONMENT if name not in os.environ]
    if missing:
        raise WorldError(
            f"{', '.join(missing)} not set: start the job with torchrun, or with a launcher that sets "
            f"{', '.join(_ENVIRONMENT)}"
        )
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])


def _check_cover(branch_ranks: Mapping[str, Sequence[int]], world_size: int) -> None:
    placed = sorted(rank for ranks in branch_ranks.values() for rank in ranks)
    empty = [branch for branch, ranks in branch_ranks.items() if not ranks]
    if placed != list(range(world_size)) or empty:
        sizes = " + ".join(f"{len(ranks)} ({branch})" for branch, ranks in branch_ranks.items())
        raise ValueError(
            f"the branches take {sizes} = {len(placed)} ranks, the job has {world_size}: every rank 0 .. "
            f"{world_size - 1} must be in exactly one branch and no branch may be empty; launch "
            f"{len(placed)} processes or change the branches' layouts"
        )


def _choose_interface(host: str) -> dict[str, str | None]:
    """Makes every Gloo group use the interface that leads to ``host``, unless one is chosen already. Gloo's
    own choice is whatever this machine's name stands for, which may be nothing, or may not be reached from
    the other machines.

    Returns:
        What the environment was where it has been changed.
    """
    before = os.environ.get(INTERFACE)
    if before or (name := interface_to(host)) is None:
        return {}
    os.environ[INTERFACE] = name
    return {INTERFACE: before}


def _launcher_serves() -> bool:
    """Whether the store is torchrun's."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _connect(rank: int, timeout: timedelta) -> tuple[dist.Store, bool]:
    """The job's store under this restart's prefix, and whether this process hosts it."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    hosts = rank == 0 and not _launcher_serves()
    try:
        tcp = serve_store(host, port, timeout) if hosts else reach_store(host, port, timeout)
    except (RuntimeError, OSError) as error:
        role = "serve" if hosts else "reach"
        raise WorldError(
            f"rank {rank} cannot {role} the job's store at MASTER_ADDR:MASTER_PORT = {host}:{port}: {error}; "
            "MASTER_ADDR must be a name or address of rank 0's machine that the job's other machines can "
            "reach, and MASTER_PORT a free port there"
        ) from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"copd/attempt_{attempt}", tcp), hosts
