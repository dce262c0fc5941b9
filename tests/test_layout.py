"""Rank layout: every rank has one place, in Megatron-Core's order; unequal branches side by side."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copd_megatron.config import BranchConfig, Config, ModelConfig, ParallelConfig, RolloutConfig
from copd_megatron.config.schema import Recompute, TeacherMode
from copd_megatron.planner.memory import MemoryEstimate, estimate_memory, stage_parameters
from copd_megatron.topology.layout import Layout
from tests.support.shapes import SHAPE

Sizes = tuple[int, int, int, int]
"""tp, cp, dp, pp"""


def make_config(branches: dict[str, tuple[Sizes, int]]) -> Config:
    """Branch name to ((tp, cp, dp, pp), rollout tp)."""
    return Config(
        model=ModelConfig(path="base"),
        branches={
            name: BranchConfig(
                parallel=ParallelConfig(
                    tensor_model_parallel_size=tp,
                    context_parallel_size=cp,
                    data_parallel_size=dp,
                    pipeline_model_parallel_size=pp,
                ),
                rollout=RolloutConfig(tensor_parallel_size=rollout_tp),
            )
            for name, ((tp, cp, dp, pp), rollout_tp) in branches.items()
        },
    )


def make_layout(**branches: tuple[Sizes, int]) -> Layout:
    return Layout.from_config(make_config(branches))


sizes = st.tuples(*[st.integers(1, 3)] * 4)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    branches = {}
    for index in range(draw(st.integers(1, 4))):
        tp, cp, dp, pp = draw(sizes)
        ranks = tp * cp * dp * pp
        divisors = [d for d in range(1, ranks + 1) if ranks % d == 0]
        branches[f"b{index}"] = ((tp, cp, dp, pp), draw(st.sampled_from(divisors)))
    return make_layout(**branches)


def test_the_worked_example_of_the_module() -> None:
    layout = make_layout(text=((1, 1, 1, 1), 1), image=((2, 1, 2, 1), 1))
    place = layout.place(4)
    assert (place.branch, place.branch_rank) == ("image", 3)
    assert (place.tp_rank, place.dp_rank, place.pp_rank) == (1, 1, 0)
    assert (place.rollout_replica, place.rollout_tp_rank) == (3, 0)
    assert layout.branches["image"].num_rollout_replicas == 4


def test_unequal_branches_take_contiguous_ranges_in_order() -> None:
    layout = make_layout(text=((2, 1, 1, 1), 1), image=((2, 1, 2, 1), 2), video=((1, 1, 1, 3), 3))
    assert layout.world_size == 9
    assert layout.branch_names == ("text", "image", "video")
    assert layout.ranks_of("text") == range(0, 2)
    assert layout.ranks_of("image") == range(2, 6)
    assert layout.ranks_of("video") == range(6, 9)
    assert [layout.branch_of(rank) for rank in (0, 1, 2, 5, 6, 8)] == [
        "text",
        "text",
        "image",
        "image",
        "video",
        "video",
    ]


@settings(max_examples=50, deadline=None)
@given(layouts())
def test_every_rank_has_one_place_and_the_inverse_finds_it(layout: Layout) -> None:
    places = list(layout.places())
    assert [place.rank for place in places] == list(range(layout.world_size))
    seen = {(p.branch, p.tp_rank, p.cp_rank, p.dp_rank, p.pp_rank): p for p in places}
    assert len(seen) == len(places)
    assert len({(p.branch, p.rollout_replica, p.rollout_tp_rank) for p in places}) == len(places)
    for place in places:
        branch = layout.branches[place.branch]
        assert place.rank == branch.first_rank + place.branch_rank
        assert place.branch_rank == branch.branch_rank_of(
            tp_rank=place.tp_rank, cp_rank=place.cp_rank, dp_rank=place.dp_rank, pp_rank=place.pp_rank
        )
        assert place.branch_rank == place.rollout_tp_rank + (
            branch.rollout_tensor_parallel_size * place.rollout_replica
        )
        assert place.rollout_replica < branch.num_rollout_replicas


@settings(max_examples=50, deadline=None)
@given(sizes)
def test_groups_are_those_of_megatron_core(branch_sizes: Sizes) -> None:
    rank_generator = pytest.importorskip("megatron.core.parallel_state").RankGenerator
    tp, cp, dp, pp = branch_sizes
    reference = rank_generator(tp=tp, ep=1, dp=dp, pp=pp, cp=cp, order="tp-cp-ep-dp-pp")
    layout = make_layout(text=(branch_sizes, 1))
    axes = ("tp", "cp", "dp", "pp")
    for axis in axes:
        groups: dict[tuple[int, ...], list[int]] = {}
        for place in layout.places():
            others = tuple(getattr(place, f"{other}_rank") for other in axes if other != axis)
            groups.setdefault(others, []).append(place.rank)
        assert sorted(groups.values()) == sorted(list(group) for group in reference.get_ranks(axis))


@pytest.mark.parametrize("rank", [-1, 2, 100])
def test_a_rank_outside_the_job_is_refused(rank: int) -> None:
    with pytest.raises(IndexError, match=r"ranks 0\.\.1"):
        make_layout(text=((2, 1, 1, 1), 1)).place(rank)


def test_names_and_coordinates_outside_are_refused() -> None:
    layout = make_layout(text=((2, 1, 1, 1), 1))
    with pytest.raises(KeyError, match="branches: text"):
        layout.ranks_of("txt")
    with pytest.raises(IndexError, match=r"tp_rank 2 is outside 0\.\.1"):
        layout.branches["text"].branch_rank_of(tp_rank=2)
    with pytest.raises(IndexError, match=r"branch ranks 0\.\.1"):
        layout.branches["text"].place(2)


def test_a_rollout_cut_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tensor_parallel_size 2 does not divide its 3 ranks"):
        make_layout(text=((3, 1, 1, 1), 2))
    with pytest.raises(ValueError, match="empty"):
        make_layout()


def test_the_table_lists_each_rank_once_and_cuts_long_branches() -> None:
    layout = make_layout(text=((2, 1, 1, 1), 1), image=((2, 1, 50, 1), 2))
    table = layout.describe(max_ranks_per_branch=8)
    rows = [line.split() for line in table.splitlines() if line[:1].isdigit()]
    assert [int(row[0]) for row in rows] == [0, 1, 2, 3, 4, 5, 98, 99, 100, 101]
    assert "image: ranks 2..101 (100), tp 2 x cp 1 x dp 50 x pp 1; rollout tp 2 x 50 replicas" in table
    full = layout.describe(max_ranks_per_branch=1000)
    assert len([line for line in full.splitlines() if line[:1].isdigit()]) == 102


# --- memory ------------------------------------------------------------------------------------------------

UNTIED = replace(SHAPE, vocab_size=256, tie_word_embeddings=False)


def test_the_fullest_stage_holds_its_layers_and_one_embedding() -> None:
    # q and o: 2 * 64 * 128; k and v: 2 * 64 * 64; gate, up, down: 3 * 64 * 192; norms 2 * 64 + 2 * 16.
    layer = 16384 + 8192 + 36864 + 160
    assert UNTIED.layer_parameters == layer
    assert stage_parameters(UNTIED, pipeline=1, tensor=1) == 4 * layer + 2 * 256 * 64 + 64
    assert stage_parameters(UNTIED, pipeline=1, tensor=1) == UNTIED.num_parameters
    assert stage_parameters(UNTIED, pipeline=2, tensor=2) == (2 * layer + 256 * 64 + 64) // 2


def test_memory_falls_with_parallelism_and_follows_the_formula() -> None:
    config = make_config({"one": ((1, 1, 1, 1), 1), "dp": ((1, 1, 4, 1), 1), "tp": ((2, 1, 1, 1), 2)})
    one, dp, tp = (
        estimate_memory(config, config.branches[name], UNTIED, on_gpu=False) for name in ("one", "dp", "tp")
    )
    assert one.weights == one.gradients == 4 * UNTIED.num_parameters
    assert one.optimizer == 8 * UNTIED.num_parameters
    assert dp.optimizer == one.optimizer // 4
    assert (dp.weights, dp.gradients) == (one.weights, one.gradients)
    assert tp.weights == one.weights // 2
    assert tp.logits == one.logits // 2
    assert tp.total < one.total
    # bfloat16: half the weights, and float32 master weights on top of the two moments.
    gpu = estimate_memory(config, config.branches["one"], UNTIED, on_gpu=True)
    assert gpu.weights == 2 * UNTIED.num_parameters
    assert gpu.optimizer == 12 * UNTIED.num_parameters


def test_memory_follows_the_options_that_save_it() -> None:
    def estimate(**changes: Any) -> MemoryEstimate:
        config = make_config({"one": ((2, 1, 2, 1), 1)})
        for key, value in changes.items():
            section, _, name = key.partition("__")
            target = config.branches["one"] if section == "branch" else config
            *path, leaf = (name if section == "branch" else key).split("__")
            for part in path:
                target = getattr(target, part)
            setattr(target, leaf, value)
        return estimate_memory(config, config.branches["one"], UNTIED, on_gpu=True)

    plain = estimate()
    # The two take turns: what is needed at once is the larger turn.
    assert plain.total == max(plain.training, plain.sampling) < plain.training + plain.rollout
    assert plain.sampling == plain.weights + plain.weight_sync + plain.rollout
    awake = estimate(memory__sleep_rollouts=False)
    assert awake.total == plain.training + plain.rollout
    lighter = estimate(memory__offload_weights=True)
    assert lighter.sampling == plain.sampling - plain.weights
    held = estimate(memory__offload_optimizer=False, memory__offload_gradients=False)
    assert held.sampling == plain.sampling + plain.optimizer + plain.gradients
    full = estimate(training__recompute=Recompute.full, training__recompute_num_layers=2)
    layer = plain.activations // UNTIED.num_layers
    inputs = 2 * 16384 * UNTIED.hidden_size
    assert full.activations == UNTIED.num_layers // 2 * inputs + 2 * layer
    parts = estimate(training__recompute=Recompute.selective, training__recompute_modules=["mlp"])
    ffn = 2 * 16384 * 4 * UNTIED.ffn_hidden_size // 2  # of a rank
    assert parts.activations == plain.activations - (UNTIED.num_layers - 1) * ffn
    assert estimate(branch__parallel__sequence_parallel=True).activations < plain.activations
    narrow = estimate(
        optimizer__precision_aware=True,
        optimizer__main_grads_dtype="bfloat16",
        optimizer__moments_dtype="uint8",
    )
    assert narrow.gradients == plain.gradients // 2
    assert narrow.optimizer == plain.optimizer // 12 * (4 + 2)
    assert estimate(optimizer__cpu_offload_fraction=0.5).optimizer == plain.optimizer // 2
    assert estimate(precision__fp8_parameters=True).weights == plain.weights // 2


def test_experts_are_spread_over_expert_parallel_ranks_only() -> None:
    moe = dataclasses.replace(UNTIED, num_experts=8, num_experts_per_token=2, expert_ffn_size=32)
    experts = 3 * 8 * 32 * UNTIED.hidden_size * UNTIED.num_layers
    one = stage_parameters(moe, pipeline=1, tensor=1)
    assert one == moe.num_parameters
    assert stage_parameters(moe, pipeline=1, tensor=1, expert=4) == one - experts + experts // 4
    assert stage_parameters(moe, pipeline=1, tensor=2) == (one - experts) // 2 + experts


def test_states_of_experts_lie_on_fewer_ranks() -> None:
    """Four ranks hold each expert twice: its states are spread over two ranks, the others' over all four."""
    moe = dataclasses.replace(UNTIED, num_experts=8, num_experts_per_token=2, expert_ffn_size=32)
    config = make_config({"one": ((1, 1, 4, 1), 1)})
    config.branches["one"].parallel.expert_model_parallel_size = 2
    experts = 3 * 8 * 32 * UNTIED.hidden_size * UNTIED.num_layers
    estimate = estimate_memory(config, config.branches["one"], moe, on_gpu=False)
    assert estimate.optimizer == 8 * ((moe.num_parameters - experts) // 4 + experts // 2 // 2)
    assert estimate.weights == 4 * (moe.num_parameters - experts + experts // 2)


def test_a_frozen_branch_keeps_no_training_state() -> None:
    config = make_config({"one": ((1, 1, 1, 1), 1)})
    config.branches["one"].frozen = True
    estimate = estimate_memory(config, config.branches["one"], UNTIED, on_gpu=False)
    assert (estimate.gradients, estimate.optimizer) == (0, 0)
    assert estimate.weights == 4 * UNTIED.num_parameters


def test_a_frozen_branch_is_not_charged_for_what_it_does_not_have() -> None:
    """No engine, no buckets of a weight sync, no reference or snapshot of weights that never change."""
    config = make_config({"one": ((1, 1, 1, 1), 1)})
    config.loss.kl_coefficient, config.opd.teacher_mode = 0.1, TeacherMode.phase_snapshot
    trained = estimate_memory(config, config.branches["one"], UNTIED, on_gpu=True)
    assert min(trained.rollout, trained.weight_sync, trained.extra_models) > 0 and trained.rollout_sleeps
    config.branches["one"].frozen = True
    for on_gpu in (False, True):
        estimate = estimate_memory(config, config.branches["one"], UNTIED, on_gpu=on_gpu)
        assert (estimate.rollout, estimate.weight_sync, estimate.extra_models) == (0, 0, 0)
        assert not estimate.rollout_sleeps
        assert estimate.total == estimate.weights + estimate.activations + estimate.logits
