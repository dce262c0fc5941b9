"""Which rows go to which data-parallel rank, in which micro-batch. Pure.

Packed (``plan_items``): rows lie behind each other; the sum of their lengths stays within the token budget,
and micro-batches are made equal in cost, since attention makes a long row dearer than as many short ones.
Padded (``plan_micro_batches``): a micro-batch of ``b`` rows is padded to its longest row ``s``; ``b x s``
stays within the token budget.

Every data-parallel rank gets the same number of micro-batches, because the pipeline schedules and the
collectives inside them run in step.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """What a row costs in a decoder layer: ``length + quadratic * length ** 2``, in units of the matrix
    multiplications of one token."""

    quadratic: float

    @classmethod
    def of_layer(cls, *, query_size: int, layer_parameters: int) -> CostModel:
        """For a layer with ``layer_parameters`` weights in use per token and ``query_size`` = heads x head
        size. Its matrices cost 2 x layer_parameters FLOPs a token, causal attention 2 x query_size x
        length ** 2 FLOPs a row (two products of [length, query_size], half of each masked).

        Worked example: Qwen3-4B has 32 x 128 = 4096 and 101 M: 8,000 tokens in one row cost 32 % more than
        their matrices, in 80 rows of 100 tokens 0.4 % more.
        """
        return cls(quadratic=query_size / layer_parameters)

    def __call__(self, length: int) -> float:
        return length + self.quadratic * length**2


@dataclass(frozen=True, kw_only=True)
class Item:
    """What goes into one micro-batch as a whole."""

    length: int
    """Tokens."""
    cost: float
    """As ``CostModel`` counts."""
    together: Hashable = None
    """Items with one key go to one rank, which then is the only one that needs the media that they show.
    None: anywhere."""


def plan_items(
    items: Sequence[Item], *, num_ranks: int, budget_tokens: int, multiple: int = 1
) -> list[list[list[int]]]:
    """Assigns items to ``plan[rank][micro_batch] = [item, ...]``; each item appears exactly once.

    As few micro-batches as the budget allows, equal in number on all ranks and as equal in cost as a greedy
    assignment (dearest item first, to the cheapest micro-batch with room) makes them; a rank's dearest come
    first, so that micro-batches that run at the same time are alike. An item longer than the budget gets a
    micro-batch of its own. A micro-batch may be empty where there are fewer items than ranks. Each rank's
    number of micro-batches is a multiple of ``multiple``. Deterministic, and the same on every rank.

    Raises:
        ValueError: no items, or a non-positive rank count or budget.
    """
    if num_ranks < 1 or budget_tokens < 1 or not items:
        raise ValueError(f"cannot plan {len(items)} rows on {num_ranks} ranks at {budget_tokens} tokens")
    if num_ranks > 1 and any(item.together is not None for item in items):
        return _plan_together(items, num_ranks=num_ranks, budget_tokens=budget_tokens, multiple=multiple)
    step = num_ranks * multiple
    count = _round_up(-(-sum(item.length for item in items) // budget_tokens), step)
    while (bins := _fill(items, count, budget_tokens)) is None:
        count += step
    costs = [sum(items[i].cost for i in members) for members in bins]
    plan: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    load = [0.0] * num_ranks
    for i in sorted(range(count), key=lambda i: (-costs[i], bins[i])):
        rank = min(
            (r for r in range(num_ranks) if len(plan[r]) < count // num_ranks), key=lambda r: (load[r], r)
        )
        plan[rank].append(bins[i])
        load[rank] += costs[i]
    return plan


def _plan_together(
    items: Sequence[Item], *, num_ranks: int, budget_tokens: int, multiple: int
) -> list[list[list[int]]]:
    """Groups of rows go, dearest first, to the rank that has least to do; each rank then fills its own
    micro-batches."""
    groups: dict[Hashable, list[int]] = {}
    for i, item in enumerate(items):
        groups.setdefault(("row", i) if item.together is None else ("key", item.together), []).append(i)
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    least = [(0.0, rank) for rank in range(num_ranks)]
    for members in sorted(
        groups.values(), key=lambda members: (-sum(items[i].cost for i in members), members)
    ):
        load, rank = heapq.heappop(least)
        shares[rank] += members
        heapq.heappush(least, (load + sum(items[i].cost for i in members), rank))
    largest = max(sum(items[i].length for i in members) for members in shares)
    count = _round_up(max(1, -(-largest // budget_tokens)), multiple)
    while None in (
        filled := [_fill([items[i] for i in members], count, budget_tokens) for members in shares]
    ):
        count += multiple
    plan = []
    for members, parts in zip(shares, filled, strict=True):
        bins = [[members[i] for i in part] for part in parts or ()]
        # rows with the same media come one after another, while the media are still in the cache
        plan.append(sorted(bins, key=lambda part: sorted(part)))
    return plan


def _fill(items: Sequence[Item], count: int, budget_tokens: int) -> list[list[int]] | None:
    """Items in ``count`` micro-batches; None where this greedy order finds no room for one of them."""
    bins: list[list[int]] = [[] for _ in range(count)]
    used = [0] * count
    cheapest = [(0.0, i) for i in range(count)]
    for number in sorted(range(len(items)), key=lambda number: (-items[number].length, number)):
        length = items[number].length
        full = []
        while cheapest:
            load, i = heapq.heappop(cheapest)
            if not bins[i] or used[i] + length <= budget_tokens:
                bins[i].append(number)
                used[i] += length
                heapq.heappush(cheapest, (load + items[number].cost, i))
                break
            full.append((load, i))
        else:
            return None
        for entry in full:
            heapq.heappush(cheapest, entry)
    return bins


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def plan_micro_batches(
    lengths: Sequence[int], *, num_ranks: int, budget_tokens: int
) -> list[list[list[int]]]:
    """Assigns rows to ``plan[rank][micro_batch] = [row, ...]``; each row appears exactly once.

    ``lengths`` are row lengths in tokens. A row longer than the budget gets a micro-batch of its own. A
    micro-batch may be empty where there are fewer rows than ranks. Deterministic, and independent of the
    caller's rank, so that all ranks compute the same plan.

    Raises:
        ValueError: no rows, or a non-positive rank count or budget.
    """
    if num_ranks < 1 or budget_tokens < 1 or not lengths:
        raise ValueError(f"cannot plan {len(lengths)} rows on {num_ranks} ranks at {budget_tokens} tokens")
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    batches: list[list[int]] = []
    for row in order:
        # rows come longest first: the first row of a micro-batch sets its padded length
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= budget_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    target = _round_up(len(batches), num_ranks)
    while len(batches) < target:
        largest = max(range(len(batches)), key=lambda i: (len(batches[i]), -i))
        rows = batches[largest]
        if len(rows) < 2:
            batches.append([])
            continue
        half = -(-len(rows) // 2)
        batches[largest : largest + 1] = [rows[:half], rows[half:]]

    def cost(batch: list[int]) -> int:
        return len(batch) * max((lengths[row] for row in batch), default=0)

    plan: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    load = [0] * num_ranks
    per_rank = len(batches) // num_ranks
    for batch in sorted(batches, key=lambda rows: (-cost(rows), rows)):
        rank = min((r for r in range(num_ranks) if len(plan[r]) < per_rank), key=lambda r: (load[r], r))
        plan[rank].append(batch)
        load[rank] += cost(batch)
    return plan
