"""The micro-batch plan as pure functions, and what a padded micro-batch holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from copd_megatron.objectives.surrogate import flatten
from copd_megatron.policy.batch.balance import CostModel, plan_micro_batches
from copd_megatron.policy.batch.context import context_shard
from copd_megatron.policy.batch.micro_batch import Arrangement, build_micro_batch
from copd_megatron.policy.batch.prompts import assign, plan_prompts, prompt_keys
from tests.support.texts import Text, grouped_texts, random_texts

lengths_lists = st.lists(st.integers(1, 300), min_size=1, max_size=60)
ranks = st.integers(1, 9)
budgets = st.integers(1, 1200)
PADDED = Arrangement(packed=False)


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


# ---- packing ---------------------------------------------------------------------------------------------

COST = CostModel(quadratic=1e-3)


def plan_packed(lengths: Sequence[int], **settings: Any) -> list[list[list[int]]]:
    """Of rows that all have prompts of their own."""
    return plan_prompts(lengths, [0] * len(lengths), range(len(lengths)), **settings)


@settings(max_examples=300, deadline=None)
@given(lengths=lengths_lists, num_ranks=ranks, budget=budgets)
def test_packed_plan_covers_rows_once_within_budget(lengths: list[int], num_ranks: int, budget: int) -> None:
    plan = plan_packed(lengths, num_ranks=num_ranks, budget_tokens=budget, cost=COST)
    assert len(plan) == num_ranks
    assert len({len(batches) for batches in plan}) == 1, "ranks run the schedule in step"
    batches = [batch for rank in plan for batch in rank]
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) <= 1 or sum(lengths[row] for row in batch) <= budget
    # two micro-batches that fit into one together are only ever kept apart for the ranks' sake
    fewest = -(-sum(lengths) // budget)
    assert len(batches) >= fewest
    assert len(batches) < 2 * fewest + len([x for x in lengths if 2 * x > budget]) + num_ranks
    for rank in plan:
        costs = [sum(COST(lengths[row]) for row in batch) for batch in rank]
        assert costs == sorted(costs, reverse=True)


@settings(max_examples=100, deadline=None)
@given(lengths=lengths_lists, num_ranks=ranks, data=st.data())
def test_packed_plan_balances_cost(lengths: list[int], num_ranks: int, data: st.DataObject) -> None:
    """Within the bound of greedy assignment: no rank is dearer than the mean by more than one row."""
    budget = 10 * sum(lengths)
    plan = plan_packed(lengths, num_ranks=num_ranks, budget_tokens=budget, cost=COST)
    costs = [sum(COST(lengths[row]) for batch in rank for row in batch) for rank in plan]
    assert max(costs) <= sum(costs) / num_ranks + COST(max(lengths)) + 1e-6
    shuffled = data.draw(st.permutations(lengths))
    other = plan_packed(shuffled, num_ranks=num_ranks, budget_tokens=budget, cost=COST)

    def shape(plan: list[list[list[int]]], lengths: list[int]) -> list[list[int]]:
        return sorted(sorted(lengths[row] for row in batch) for rank in plan for batch in rank)

    assert shape(plan, lengths) == shape(other, list(shuffled))


def test_a_long_row_weighs_more_than_its_tokens_in_short_rows() -> None:
    """One row of 8000 against 80 of 100 and some: equal token counts would be unequal work."""
    cost = CostModel.of_layer(query_size=4096, layer_parameters=101_000_000)
    assert cost(8000) / 8000 == pytest.approx(1.32, abs=0.01)
    lengths = [8000] + [100] * 120
    plan = plan_packed(lengths, num_ranks=2, budget_tokens=16384, cost=cost)
    (first,), (second,) = sorted(plan, key=lambda rank: len(rank[0]))
    tokens = [sum(lengths[row] for row in batch) for batch in (first, second)]
    costs = [sum(cost(lengths[row]) for row in batch) for batch in (first, second)]
    assert tokens[1] - tokens[0] > 1000
    assert abs(costs[1] - costs[0]) < 200


@pytest.mark.parametrize(
    ("lengths", "num_ranks", "budget"),
    [([], 1, 8), ([3], 0, 8), ([3], 1, 0)],
    ids=["rows", "ranks", "budget"],
)
def test_impossible_packed_plans_are_refused(lengths: list[int], num_ranks: int, budget: int) -> None:
    with pytest.raises(ValueError, match="cannot plan"):
        plan_packed(lengths, num_ranks=num_ranks, budget_tokens=budget, cost=COST)


def test_packed_micro_batch_points_each_response_token_at_the_state_before_it() -> None:
    texts = random_texts(7, 300, seed=3)
    rows, states = [4, 0, 5], [[0, t.response_length - 1] for t in texts]
    batch = build_micro_batch(
        rows, texts, device=torch.device("cpu"), arrangement=Arrangement(multiple=8), states=states
    )
    lengths = [len(texts[row].token_ids) for row in rows]
    total = -(-sum(lengths) // 8) * 8
    assert batch.boundaries is not None
    ends = np.cumsum([0, *lengths]).tolist()
    assert batch.boundaries.cu_seqlens.tolist() == ends + [total] * (total > sum(lengths))
    assert batch.boundaries.cu_seqlens.dtype is torch.int32
    assert batch.boundaries.max_length == max(lengths)
    assert batch.input_ids_bs.shape == batch.position_ids.shape == (1, total)
    tokens, predicted, wanted = batch.input_ids_bs[0], [], []
    for place, row in enumerate(rows):
        text, start = texts[row], ends[place]
        assert tokens[start : start + lengths[place]].tolist() == text.token_ids.tolist()
        assert batch.position_ids[0, start : start + lengths[place]].tolist() == list(range(lengths[place]))
        predicted += [start + t - 1 for t in range(text.prompt_length, lengths[place])]
        wanted += [start + text.prompt_length + i - 1 for i in states[row]]
    assert batch.hidden_index_n.tolist() == predicted
    assert batch.state_index.tolist() == wanted
    assert batch.targets_n.tolist() == tokens[batch.hidden_index_n + 1].tolist()
    assert batch.place_n is None and batch.num_states == 6


# ---- context parallelism ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cp", [2, 3, 4])
def test_context_ranks_share_a_pack(cp: int) -> None:
    """Every token and every target lies on one rank, in Transformer Engine's order of chunks."""
    texts = random_texts(5, 300, seed=cp)
    states = [[0] for _ in texts]
    cpu, rows = torch.device("cpu"), range(len(texts))
    whole = build_micro_batch(rows, texts, device=cpu, arrangement=Arrangement(), states=states)
    padded = [-(-len(t.token_ids) // (2 * cp)) * 2 * cp for t in texts]
    places, tokens_seen, state_places = [], 0, []
    for rank in range(cp):
        arrangement = Arrangement(cp_size=cp, cp_rank=rank)
        batch = build_micro_batch(rows, texts, device=cpu, arrangement=arrangement, states=states)
        assert batch.boundaries is not None and batch.place_n is not None and batch.state_place is not None
        assert batch.boundaries.cu_seqlens.tolist() == np.cumsum([0, *padded]).tolist()
        assert batch.input_ids_bs.shape == (1, sum(padded) // cp)
        assert batch.position_ids.shape == (1, sum(padded) // cp)
        assert batch.targets_n.tolist() == whole.targets_n[batch.place_n].tolist()
        assert batch.row_index_n.tolist() == whole.row_index_n.tolist()
        # the state that predicts a target lies where the token before it does
        held = context_shard(batch.boundaries.cu_seqlens.tolist(), cp, rank)
        before = held[batch.hidden_index_n.numpy()]
        rows_of = whole.row_index_n[batch.place_n].numpy()
        starts, whole_starts = np.cumsum([0, *padded])[rows_of], np.cumsum([0, *map(_length, texts)])[rows_of]
        expected = whole.hidden_index_n[batch.place_n].numpy()
        assert (before - starts).tolist() == (expected - whole_starts).tolist()
        places += batch.place_n.tolist()
        state_places += batch.state_place.tolist()
        tokens_seen += int(batch.input_ids_bs.sum())
    assert sorted(places) == list(range(len(whole.targets_n)))
    assert sorted(state_places) == list(range(whole.num_states))
    assert tokens_seen == int(whole.input_ids_bs.sum())


def _length(text: Text) -> int:
    return len(text.token_ids)


def test_context_shard_worked_example() -> None:
    assert context_shard([0, 8], 2, 0).tolist() == [0, 1, 6, 7]
    assert context_shard([0, 8, 12], 2, 1).tolist() == [2, 3, 4, 5, 9, 10]
    assert context_shard([0, 5, 7], 1, 0).tolist() == list(range(7))
    with pytest.raises(ValueError, match="multiple of 4"):
        context_shard([0, 6], 2, 0)


def test_context_parallelism_needs_packing() -> None:
    with pytest.raises(ValueError, match="sequence_packing"):
        Arrangement(packed=False, cp_size=2)


# ---- padding ----------------------------------------------------------------------------------------------


def test_micro_batch_points_each_response_token_at_the_state_before_it() -> None:
    texts = random_texts(7, 300, seed=3)
    rows, states = [4, 0, 5], [[0, t.response_length - 1] for t in texts]
    batch = build_micro_batch(rows, texts, device=torch.device("cpu"), arrangement=PADDED, states=states)
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
    batch = build_micro_batch(
        [], random_texts(2, 300), device=torch.device("cpu"), arrangement=PADDED, states=[[0], [0]]
    )
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


@given(
    rows=st.lists(st.tuples(st.integers(1, 40), st.sampled_from([None, "a", "b", "c", "d"])), min_size=1),
    num_ranks=st.integers(2, 4),
    budget=st.integers(1, 90),
    multiple=st.integers(1, 3),
)
def test_rows_that_show_the_same_media_are_on_one_rank(
    rows: list[tuple[int, str | None]], num_ranks: int, budget: int, multiple: int
) -> None:
    lengths, keys = [length for length, _ in rows], [key for _, key in rows]
    plan = plan_packed(
        lengths,
        num_ranks=num_ranks,
        budget_tokens=budget,
        cost=CostModel(quadratic=0.01),
        multiple=multiple,
        together=keys,
    )
    assert sorted(row for rank in plan for part in rank for row in part) == list(range(len(rows)))
    assert len({len(rank) for rank in plan}) == 1 and len(plan[0]) % multiple == 0
    for part in (part for rank in plan for part in rank):
        assert len(part) < 2 or sum(lengths[row] for row in part) <= budget
    for key in {key for key in keys if key is not None}:
        members = {row for row, its in enumerate(keys) if its == key}
        assert sum(bool(members & {row for part in rank for row in part}) for rank in plan) == 1


def test_groups_are_spread_over_ranks_by_what_they_cost() -> None:
    keys = [group for group in range(6) for _ in range(4)]
    lengths = [{0: 30, 1: 20, 2: 20}.get(group, 10) for group in keys]
    plan = plan_packed(lengths, num_ranks=2, budget_tokens=60, cost=CostModel(quadratic=0.0), together=keys)
    assert [sum(lengths[row] for part in rank for row in part) for rank in plan] == [200, 200]


# ---- shared prompts --------------------------------------------------------------------------------------


@st.composite
def groups_of_rows(draw: st.DrawFn) -> tuple[list[int], list[int], list[int]]:
    """(lengths, prompts, keys) of rows, the members of a group apart from one another."""
    prompts = draw(st.lists(st.integers(1, 60), min_size=1, max_size=6))
    keys = draw(st.lists(st.integers(0, len(prompts) - 1), min_size=1, max_size=30))
    responses = draw(st.lists(st.integers(1, 60), min_size=len(keys), max_size=len(keys)))
    own = [prompts[key] for key in keys]
    return [p + r for p, r in zip(own, responses, strict=True)], own, keys


def _tokens(rows: list[int], lengths: list[int], prompts: list[int], keys: list[int]) -> int:
    """Of a micro-batch: responses, and each run of one key's prompt."""
    runs = [row for place, row in enumerate(rows) if not place or keys[rows[place - 1]] != keys[row]]
    return sum(lengths[row] - prompts[row] for row in rows) + sum(prompts[row] for row in runs)


@settings(max_examples=300, deadline=None)
@given(made=groups_of_rows(), num_ranks=ranks, budget=budgets, multiple=st.integers(1, 3))
def test_shared_plan_covers_rows_once_within_budget_and_is_never_slower(
    made: tuple[list[int], list[int], list[int]], num_ranks: int, budget: int, multiple: int
) -> None:
    lengths, prompts, keys = made
    plan = plan_prompts(
        lengths,
        prompts,
        keys,
        num_ranks=num_ranks,
        budget_tokens=budget,
        cost=CostModel(quadratic=0.0),
        multiple=multiple,
    )
    assert len({len(parts) for parts in plan}) == 1 and len(plan[0]) % multiple == 0
    batches = [batch for rank in plan for batch in rank]
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) <= 1 or _tokens(batch, lengths, prompts, keys) <= budget
    slowest = max(sum(_tokens(batch, lengths, prompts, keys) for batch in rank) for rank in plan)
    separate = plan_packed(
        lengths,
        num_ranks=num_ranks,
        budget_tokens=budget,
        cost=CostModel(quadratic=0.0),
        multiple=multiple,
    )
    assert slowest <= max(sum(lengths[row] for batch in rank for row in batch) for rank in separate)


def test_a_group_is_cut_where_a_rank_would_have_nothing_to_do() -> None:
    lengths, prompts, keys = [20] * 8, [10] * 8, [0] * 8
    free = CostModel(quadratic=0.0)
    two = plan_prompts(lengths, prompts, keys, num_ranks=2, budget_tokens=1000, cost=free)
    assert [_tokens(batch, lengths, prompts, keys) for rank in two for batch in rank] == [50, 50]
    one = plan_prompts(lengths, prompts, keys, num_ranks=1, budget_tokens=1000, cost=free)
    assert [_tokens(batch, lengths, prompts, keys) for rank in one for batch in rank] == [90]


def test_a_prompt_stands_once_in_a_pack_and_every_row_is_whole() -> None:
    texts = grouped_texts(3, 4, 300, seed=5)
    keys = prompt_keys(texts)
    assert len(set(keys)) == 3
    assigned = assign(
        texts,
        arrangement=Arrangement(),
        share_prompts=True,
        num_ranks=1,
        budget_tokens=10**6,
        cost=COST,
    )
    ((rows,),) = assigned.plan
    batch = build_micro_batch(rows, texts, device=torch.device("cpu"), prompt_keys=assigned.prompt_keys)
    ids, positions = batch.input_ids_bs[0], batch.position_ids[0]
    groups = dict(zip(keys, texts, strict=True))
    fewest = sum(text.response_length for text in texts) + sum(t.prompt_length for t in groups.values())
    assert len(ids) == fewest == assigned.most_tokens
    assert batch.boundaries is not None and batch.boundaries.spread is not None
    ends = batch.boundaries.cu_seqlens.tolist()
    whole = batch.boundaries.spread.index
    for place, row in enumerate(rows):
        mine = whole[ends[place] : ends[place + 1]]
        assert ids[mine].tolist() == texts[row].token_ids.tolist()
        assert positions[mine].tolist() == list(range(len(texts[row].token_ids)))
        before = batch.hidden_index_n[batch.row_index_n == place]
        assert before.tolist() == mine[texts[row].prompt_length - 1 : -1].tolist()
        targets = batch.targets_n[batch.row_index_n == place]
        assert targets.tolist() == texts[row].token_ids[texts[row].prompt_length :].tolist()


def test_rows_that_must_stand_whole_share_nothing() -> None:
    texts = grouped_texts(1, 2, 300)
    cpu, keys = torch.device("cpu"), [0, 0]
    padded = build_micro_batch([0, 1], texts, device=cpu, arrangement=PADDED, prompt_keys=keys)
    assert padded.input_ids_bs.shape[0] == 2
    with pytest.raises(ValueError, match="whole"):
        build_micro_batch([0, 1], texts, device=cpu, arrangement=Arrangement(cp_size=2), prompt_keys=keys)
