"""Rows with one prompt, which then stands in a pack once. Pure.

The responses of a group begin with the same tokens, of which a layer makes the same. So their prompt's tokens
go through a layer once, and only attention sees every row whole.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from copd_megatron.policy.batch.balance import CostModel, Item, plan_items, plan_micro_batches
from copd_megatron.policy.batch.micro_batch import Arrangement, Sequenced
from copd_megatron.records import IntArray


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """Which rows are computed where."""

    plan: list[list[list[int]]]
    """``plan[rank][micro_batch] = [row, ...]``"""
    prompt_keys: Sequence[Hashable]
    """Of each row; neighbours with one key share their prompt."""
    most_tokens: int
    """Of any micro-batch of a pack."""


def assign(
    sequences: Sequence[Sequenced],
    *,
    arrangement: Arrangement,
    share_prompts: bool,
    num_ranks: int,
    budget_tokens: int,
    cost: CostModel,
    multiple: int = 1,
) -> Assignment:
    """Rows to data-parallel ranks and micro-batches.

    Args:
        budget_tokens: most tokens of a micro-batch on one data- and context-parallel rank.
        multiple: of a rank's number of micro-batches.
    """
    lengths = [arrangement.padded_length(len(sequence.token_ids)) for sequence in sequences]
    prompts = [sequence.prompt_length for sequence in sequences]
    keys = prompt_keys(sequences) if share_prompts else range(len(sequences))
    if arrangement.packed:
        plan = plan_prompts(
            lengths,
            prompts,
            keys,
            num_ranks=num_ranks,
            budget_tokens=budget_tokens * arrangement.cp_size,
            cost=cost,
            multiple=multiple,
            together=[getattr(sequence, "media", ()) or None for sequence in sequences],
        )
    else:
        plan = plan_micro_batches(lengths, num_ranks=num_ranks, budget_tokens=budget_tokens)
    return Assignment(
        plan=plan,
        prompt_keys=keys,
        most_tokens=max(_tokens(rows, lengths, prompts, keys) for rank in plan for rows in rank),
    )


def prompt_keys(sequences: Sequence[Sequenced]) -> list[Hashable]:
    """Of each row, what it has in common with just those that have the same prompt: its tokens, and the media
    that their placeholders stand for."""
    return [
        (_prompt(sequence).astype(np.int64).tobytes(), getattr(sequence, "media", ()) or None)
        for sequence in sequences
    ]


def plan_prompts(
    lengths: Sequence[int],
    prompts: Sequence[int],
    keys: Sequence[Hashable],
    *,
    num_ranks: int,
    budget_tokens: int,
    cost: CostModel,
    multiple: int = 1,
    together: Sequence[Hashable] | None = None,
) -> list[list[list[int]]]:
    """Assigns rows to ``plan[rank][micro_batch] = [row, ...]`` as ``balance.plan_items`` does, groups of one
    prompt as a whole.

    ``prompts`` are the lengths of the rows' prompts, ``keys`` as ``prompt_keys`` makes them. Rows of one
    prompt that go to one micro-batch follow one another there. A group is cut where the ranks' work would
    else be less equal than the repeated prompt costs, or where it is longer than the budget.

    Worked example: two ranks, one group of 8 rows with 10 tokens of prompt and 10 of response: whole, it
    would be 90 tokens on one rank and none on the other; cut in two, it is 50 on each.
    """
    groups: dict[Hashable, list[int]] = {}
    for row, key in enumerate(keys):
        groups.setdefault(key, []).append(row)
    largest = max((len(rows) for rows in groups.values()), default=1)
    best: tuple[float, list[list[list[int]]]] | None = None
    pieces = 1
    while True:
        units = [
            unit
            for rows in groups.values()
            for unit in _units(rows, lengths, prompts, pieces=pieces, budget_tokens=budget_tokens)
        ]
        items = [
            Item(
                length=prompts[unit[0]] + sum(lengths[row] - prompts[row] for row in unit),
                cost=sum(cost(lengths[row]) for row in unit) - (len(unit) - 1) * prompts[unit[0]],
                together=None if together is None else together[unit[0]],
            )
            for unit in units
        ]
        plan = plan_items(items, num_ranks=num_ranks, budget_tokens=budget_tokens, multiple=multiple)
        slowest = max(sum(items[i].cost for part in rank for i in part) for rank in plan)
        if best is None or slowest < best[0]:
            # parts of a group that meet again come one after another
            best = slowest, [[[r for i in sorted(part) for r in units[i]] for part in rank] for rank in plan]
        if num_ranks == 1 or pieces >= largest:
            return best[1]
        pieces *= 2


def _units(
    rows: Sequence[int],
    lengths: Sequence[int],
    prompts: Sequence[int],
    *,
    pieces: int,
    budget_tokens: int,
) -> list[list[int]]:
    """A group in at least ``pieces`` parts if it has as many rows, each within the budget where it can be."""
    most = -(-len(rows) // pieces)
    units: list[list[int]] = []
    room = 0
    for row in rows:
        response = lengths[row] - prompts[row]
        if not units or len(units[-1]) == most or response > room:
            units.append([])
            room = budget_tokens - prompts[row]
        units[-1].append(row)
        room -= response
    return units


def _prompt(sequence: Sequenced) -> IntArray:
    return np.asarray(sequence.token_ids)[: sequence.prompt_length]


def _tokens(
    rows: Sequence[int], lengths: Sequence[int], prompts: Sequence[int], keys: Sequence[Hashable]
) -> int:
    """Of a micro-batch in which neighbours with one key share their prompt."""
    again = sum(prompts[row] for before, row in pairwise(rows) if keys[row] == keys[before])
    return sum(lengths[row] for row in rows) - again
