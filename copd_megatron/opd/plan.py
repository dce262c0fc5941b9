"""The exchange plan: which rank sends which rows of an edge to which rank. Pure.

All ranks of a branch hold all of its rollouts, and all ranks of the teacher need them, so the cheap way is
that each byte crosses between branches once, over several links at a time, and is then shared inside the
receiving branch. An edge is split into lanes, as many as the smaller of its two branches has ranks, but at
most ``MOST_LANES``: each lane is a broadcast in the receiving branch, and lanes x ranks of them would grow
with the square of a branch. Lane i runs from one rank of the student to one rank of the teacher (requests),
and back (scores). A hub serves many edges, so every edge takes the ranks of each branch that have the fewest
lane ends so far.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from copd_megatron.config.graph import Edge

MOST_LANES: Final = 32
"""Of an edge. 32 links carry a step's rows, hundreds of megabytes at most, in less than a second."""


@dataclass(frozen=True, kw_only=True)
class Lane:
    """One link of an edge. Requests go from source to destination, scores back."""

    edge: Edge
    index: int
    """0 .. number of the edge's lanes - 1."""
    source: int
    """Global rank in the student branch."""
    destination: int
    """Global rank in the teacher branch."""


@dataclass(frozen=True)
class ExchangePlan:
    """The lanes of every edge; the same on every rank."""

    lanes: Mapping[Edge, tuple[Lane, ...]]

    def sends_of(self, rank: int) -> tuple[Lane, ...]:
        """Lanes over which ``rank`` sends requests and receives scores."""
        return tuple(lane for lanes in self.lanes.values() for lane in lanes if lane.source == rank)

    def receives_of(self, rank: int) -> tuple[Lane, ...]:
        """Lanes over which ``rank`` receives requests and sends scores."""
        return tuple(lane for lanes in self.lanes.values() for lane in lanes if lane.destination == rank)


def plan_exchange(edges: Sequence[Edge], branch_ranks: Mapping[str, Sequence[int]]) -> ExchangePlan:
    """Lanes for every edge. Deterministic in its arguments.

    In each branch the numbers of lane ends that two ranks serve differ by at most one.

    Args:
        edges: in the graph's order.
        branch_ranks: branch name to global ranks.

    Raises:
        ValueError: an edge between branches that share a rank or have none.
    """
    ends = {branch: dict.fromkeys(ranks, 0) for branch, ranks in branch_ranks.items()}
    lanes: dict[Edge, tuple[Lane, ...]] = {}
    for edge in edges:
        students, teachers = branch_ranks[edge.student], branch_ranks[edge.teacher]
        if not students or not teachers or set(students) & set(teachers):
            raise ValueError(
                f"edge {edge.name}: ranks {list(students)} and {list(teachers)} must be disjoint and not "
                "empty"
            )
        count = min(len(students), len(teachers), MOST_LANES)
        sources = _least_busy(ends[edge.student], count)
        destinations = _least_busy(ends[edge.teacher], count)
        lanes[edge] = tuple(
            Lane(edge=edge, index=i, source=source, destination=destination)
            for i, (source, destination) in enumerate(zip(sources, destinations, strict=True))
        )
    return ExchangePlan(lanes)


def _least_busy(ends: dict[int, int], count: int) -> list[int]:
    """Take the ``count`` ranks with the fewest lane ends, ties by rank order, and book one more on each."""
    order = {rank: i for i, rank in enumerate(ends)}
    chosen = heapq.nsmallest(count, ends, key=lambda rank: (ends[rank], order[rank]))
    for rank in chosen:
        ends[rank] += 1
    return chosen


def split_rows(num_tokens: Sequence[int], num_lanes: int) -> tuple[tuple[int, ...], ...]:
    """Which rows go over which lane, balanced by tokens.

    Longest row first onto the least loaded lane: no lane exceeds the mean by more than the longest row.

    Args:
        num_tokens: length of each row.
        num_lanes: at least 1; lanes may stay empty.

    Returns:
        Per lane, ascending indices into the rows; together each index exactly once.
    """
    if num_lanes < 1:
        raise ValueError(f"num_lanes is {num_lanes}; give at least 1")
    lanes: list[list[int]] = [[] for _ in range(num_lanes)]
    heap = [(0, lane) for lane in range(num_lanes)]
    for row in sorted(range(len(num_tokens)), key=lambda i: (-num_tokens[i], i)):
        load, lane = heapq.heappop(heap)
        lanes[lane].append(row)
        heapq.heappush(heap, (load + num_tokens[row], lane))
    return tuple(tuple(sorted(rows)) for rows in lanes)
