"""The micro-batch plan as pure functions, and what a padded micro-batch holds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from copd_megatron.policy.batch import build_micro_batch, flatten
from copd_megatron.policy.microbatch import plan_micro_batches
from tests.models import Text, random_texts

lengths_lists = st.lists(st.integers(1, 300), min_size=1, max_size=60)
ranks = st.integers(1, 9)
budgets = st.integers(1, 1200)


def _cost(batch: list[int], lengths: list[int]) -> int:
    return len(batch) * max((lengths[row] for row in batch), default=0)


@settings(max_examples=300, deadline=None)
@given(lengths=lengths_lists, num_ranks=ranks, budget=budgets)
def test_plan_covers_rows_once_within_budget(lengths: list[int], num_ranks: int, budget: int) -> None:
    plan = plan_micro_batches(lengths, num_ranks=num_ranks, budget_tokens=budget)
    assert len(plan) == num_ranks
    assert len({len(batches) for batches in plan}) == 1, "ranks run the schedule in step"
    assert plan[0], "at least one micro-batch, so that every rank takes part"
    batches = [batch for rank in plan for batch in rank]
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) <= 1 or _cost(batch, lengths) <= budget
    # a row has company unless the budget or the number of ranks forbids it
    empty = sum(not batch for batch in batches)
    assert not empty or len(lengths) < len(batches)


@settings(max_examples=100, deadline=None)
@given(lengths=lengths_lists, num_ranks=ranks, budget=budgets, data=st.data())
def test_plan_is_deterministic_and_blind_to_row_order(
    lengths: list[int], num_ranks: int, budget: int, data: st.DataObject
) -> None:
    plan = plan_micro_batches(lengths, num_ranks=num_ranks, budget_tokens=budget)
    assert plan == plan_micro_batches(tuple(lengths), num_ranks=num_ranks, budget_tokens=budget)
    shuffled = data.draw(st.permutations(lengths))
    other = plan_micro_batches(shuffled, num_ranks=num_ranks, budget_tokens=budget)

    def shape(plan: list[list[list[int]]], lengths: list[int]) -> list[list[int]]:
        return sorted(sorted(lengths[row] for row in batch) for rank in plan for batch in rank)

    assert shape(plan, lengths) == shape(other, list(shuffled))


@settings(max_examples=100, deadline=None)
@given(length=st.integers(1, 200), count=st.integers(1, 64), num_ranks=ranks)
def test_equal_rows_are_spread_evenly(length: int, count: int, num_ranks: int) -> None:
    plan = plan_micro_batches([length] * count, num_ranks=num_ranks, budget_tokens=length * 4)
    loads = [sum(_cost(batch, [length] * count) for batch in rank) for rank in plan]
    largest = max(_cost(batch, [length] * count) for rank in plan for batch in rank)
    assert max(loads) - min(loads) <= largest * len(plan[0])
    assert max(len(rank) for rank in plan) <= -(-count // num_ranks)


def test_ample_budget_gives_one_micro_batch_a_rank() -> None:
    plan = plan_micro_batches([5, 9, 7, 3], num_ranks=2, budget_tokens=10**6)
    assert [len(rank) for rank in plan] == [1, 1]
    assert sorted(len(rank[0]) for rank in plan) == [2, 2]


@pytest.mark.parametrize(
    ("lengths", "num_ranks", "budget"),
    [([], 1, 10), ([3], 0, 10), ([3], 1, 0)],
    ids=["rows", "ranks", "budget"],
)
def test_impossible_plans_are_refused(lengths: list[int], num_ranks: int, budget: int) -> None:
    with pytest.raises(ValueError, match="cannot plan"):
        plan_micro_batches(lengths, num_ranks=num_ranks, budget_tokens=budget)


# ---- padding ----------------------------------------------------------------------------------------------


def test_micro_batch_points_each_response_token_at_the_state_before_it() -> None:
    texts = random_texts(7, 300, seed=3)
    rows, states = [4, 0, 5], [[0, t.response_length - 1] for t in texts]
    batch = build_micro_batch(rows, texts, device=torch.device("cpu"), states=states)
    b, s = batch.input_ids_bs.shape
    assert (b, s) == (3, max(len(texts[row].token_ids) for row in rows))
    # stand-in hidden states [s, b] that say where they come from
    hidden = [(position, place) for position in range(s) for place in range(b)]
    expected, wanted_states, targets = [], [], []
    for place, row in enumerate(rows):
        text = texts[row]
        for position in range(text.prompt_length, len(text.token_ids)):
            expected.append((position - 1, place))
            targets.append(int(text.token_ids[position]))
        wanted_states += [(text.prompt_length + i - 1, place) for i in states[row]]
        assert batch.input_ids_bs[place, : len(text.token_ids)].tolist() == text.token_ids.tolist()
        assert not batch.input_ids_bs[place, len(text.token_ids) :].any()
    assert [hidden[i] for i in batch.hidden_index_n] == expected
    assert [hidden[i] for i in batch.state_index] == wanted_states
    assert batch.targets_n.tolist() == targets
    assert batch.row_index_n.tolist() == [place for _, place in expected]
    assert batch.position_ids.reshape(-1, s)[0].tolist() == list(range(s))


def test_rank_without_rows_gets_a_dummy_without_targets() -> None:
    batch = build_micro_batch([], random_texts(2, 300), device=torch.device("cpu"), states=[[0], [0]])
    assert batch.input_ids_bs.shape == (1, 1)
    assert batch.hidden_index_n.numel() == batch.targets_n.numel() == batch.state_index.numel() == 0


def test_flatten_follows_the_batch_order() -> None:
    values = [np.full(n, n, dtype=np.float64) for n in (1, 2, 3)]
    flat = flatten([2, 0], values, torch.device("cpu"))
    assert flat.dtype is torch.float32
    assert flat.tolist() == [3, 3, 3, 1]
    assert flatten([], values, torch.device("cpu")).shape == (0,)


def test_one_token_prompt_is_scored_from_its_only_state() -> None:
    text = Text(token_ids=np.asarray([7, 8], dtype=np.int32), prompt_length=1)
    batch = build_micro_batch([0], [text], device=torch.device("cpu"))
    assert (batch.hidden_index_n.tolist(), batch.targets_n.tolist()) == ([0], [8])
