"""Which node each rank runs on: pure arithmetic, no torch.

Tensor parallelism communicates most and so stays inside a node: a branch is placed in blocks of ``lcm(tp,
rollout tp)`` neighbouring ranks, and no block is split. A branch fills whole nodes first; the rest of it
goes, in one piece, where it fits most tightly. So every branch spans as few nodes as possible:

    spans = ceil(ranks / (block * floor(ranks_per_node / block)))

Worked example: branches of 4, 8 and 4 ranks with tp 4 on nodes of 8 take two nodes, the 8 on one of them and
both fours on the other, although rank order alone would split the 8.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from copd_megatron.topology.layout import BranchLayout, Layout


class PlacementError(ValueError):
    """The branches do not fit the nodes; the message names the number of nodes that does."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where the ranks of a job run."""

    node_of_rank: tuple[int, ...]
    """By global rank; nodes are numbered from 0, rank 0 is on node 0."""
    num_nodes: int
    ranks_per_node: int
    spans: dict[str, int]
    """Number of nodes that each branch is spread over."""

    @property
    def num_idle(self) -> int:
        """Places for ranks (GPUs) that stay idle."""
        return self.num_nodes * self.ranks_per_node - len(self.node_of_rank)

    def describe(self) -> str:
        """One line for people."""
        spans = ", ".join(f"{name} on {n} node{'s' if n > 1 else ''}" for name, n in self.spans.items())
        idle = f"; {self.num_idle} of {self.num_nodes * self.ranks_per_node} places stay idle"
        return f"{len(self.node_of_rank)} ranks on {self.num_nodes} x {self.ranks_per_node}: {spans}" + (
            idle if self.num_idle else ""
        )


@dataclass(kw_only=True)
class _Node:
    free: int
    pieces: list[tuple[str, int]] = field(default_factory=list)
    """(branch, number of ranks)"""


def place(layout: Layout, *, num_nodes: int | None, ranks_per_node: int) -> Placement:
    """Assigns the ranks of ``layout`` to nodes of equal size.

    Args:
        layout: the branches.
        num_nodes: nodes of the job; None: as many as needed.
        ranks_per_node: ranks that a node has room for, one per GPU.

    Raises:
        PlacementError: a tensor-parallel group is larger than a node, or ``num_nodes`` is not what the
            branches need.
    """
    if ranks_per_node < 1:
        raise PlacementError(f"{ranks_per_node} ranks per node: give at least 1 (sbatch --ntasks-per-node)")
    nodes = _pack(layout, ranks_per_node)
    if num_nodes is not None and num_nodes != len(nodes):
        needs = " + ".join(
            f"{branch.world_size} ({name}, in blocks of {_block(branch)})"
            for name, branch in layout.branches.items()
        )
        alternatives = _alternatives(layout, ranks_per_node, len(nodes))
        raise PlacementError(
            f"the branches need {needs} = {layout.world_size} ranks, that is {len(nodes)} "
            f"node{'s' if len(nodes) > 1 else ''} of {ranks_per_node}; the job has {num_nodes}. Submit it "
            f"with --nodes={len(nodes)}{alternatives}, or change the branches' parallel sizes"
        )
    # In rank order, so that neighbouring ranks are on neighbouring nodes and rank 0 is on node 0.
    first = {name: branch.first_rank for name, branch in layout.branches.items()}
    nodes.sort(key=lambda node: min(first[name] for name, _ in node.pieces))
    node_of_rank = [0] * layout.world_size
    next_rank, spans = dict(first), Counter[str]()
    for number, node in enumerate(nodes):
        for name, count in node.pieces:
            node_of_rank[next_rank[name] : next_rank[name] + count] = [number] * count
            next_rank[name] += count
            spans[name] += 1
    return Placement(
        node_of_rank=tuple(node_of_rank),
        num_nodes=len(nodes),
        ranks_per_node=ranks_per_node,
        spans={name: spans[name] for name in layout.branches},
    )


def host_list(placement: Placement, hosts: Sequence[str]) -> list[str]:
    """The host of every rank, by global rank, as SLURM's arbitrary distribution reads it.

    Raises:
        PlacementError: the number of hosts is not the number of nodes.
    """
    if len(hosts) != placement.num_nodes:
        raise PlacementError(f"{len(hosts)} hosts for {placement.num_nodes} nodes: {', '.join(hosts)}")
    return [hosts[node] for node in placement.node_of_rank]


def _block(branch: BranchLayout) -> int:
    """Ranks that must share a node."""
    return math.lcm(branch.tensor_parallel_size, branch.rollout_tensor_parallel_size)


def _pack(layout: Layout, ranks_per_node: int) -> list[_Node]:
    """Best fit, largest piece first; no piece of a branch is larger than a node."""
    pieces: list[tuple[str, int]] = []
    for name, branch in layout.branches.items():
        block = _block(branch)
        if block > ranks_per_node:
            raise PlacementError(
                f"branches.{name}: tensor parallelism {branch.tensor_parallel_size} (rollout "
                f"{branch.rollout_tensor_parallel_size}) ties {block} ranks to one node, which has room for "
                f"{ranks_per_node}: lower it, or submit with nodes of at least {block} GPUs"
            )
        most = ranks_per_node // block * block
        full, rest = divmod(branch.world_size, most)
        pieces += [(name, most)] * full + ([(name, rest)] if rest else [])
    nodes: list[_Node] = []
    for name, count in sorted(pieces, key=lambda piece: -piece[1]):
        fitting = [node for node in nodes if node.free >= count]
        node = min(fitting, key=lambda n: n.free, default=None)
        if node is None:
            node = _Node(free=ranks_per_node)
            nodes.append(node)
        node.free -= count
        node.pieces.append((name, count))
    return nodes


def _alternatives(layout: Layout, ranks_per_node: int, num_nodes: int) -> str:
    """A hint at smaller nodes that would be filled, where these are not."""
    per_node = layout.world_size // num_nodes
    if layout.world_size % num_nodes or per_node >= ranks_per_node:
        return ""
    try:
        fits = len(_pack(layout, per_node)) == num_nodes
    except PlacementError:
        return ""
    return f" (and --ntasks-per-node={per_node}, which leaves nothing idle)" if fits else ""
