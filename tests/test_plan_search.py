"""The search for layouts against trying all combinations, and what it refuses."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from copd_megatron.config import validate
from copd_megatron.config.schema import Recompute
from copd_megatron.planner.machine import Machine, read_machine, with_figures
from copd_megatron.planner.plan import Inputs, make_plan
from copd_megatron.planner.search import layouts_of, search, with_layouts
from copd_megatron.planner.workload import BranchLengths
from tests.test_planner import fixed, inputs_of

H100 = read_machine("h100")
TIGHT = with_figures(H100, {"memory_gib": 40.0})


def two_branches(machine: Machine, *overrides: str) -> Inputs:
    inputs = inputs_of("two_branch_qwen3_vl_4b", "model.path=Qwen3-1.7B", *overrides, machine=machine)
    longer = BranchLengths(prompt=fixed(300), response=fixed(6000))
    return replace(inputs, lengths={**inputs.lengths, "image": longer})


def brute_force(inputs: Inputs, ranks: int) -> tuple[float, int]:
    """Least seconds of all combinations of layouts that the trainer takes and that fit; their number."""
    best, count = float("inf"), 0
    layouts = {name: list(layouts_of(inputs, name, ranks)) for name in inputs.config.branches}
    for choice in itertools.product(*layouts.values()):
        tried = with_layouts(inputs, dict(zip(layouts, choice, strict=True)))
        plan = make_plan(tried)
        if plan.ranks > ranks or plan.problems:
            continue
        count += 1
        best = min(best, plan.seconds)
    return best, count


SHORT = (
    "model.max_sequence_tokens=8192",
    "training.micro_batch_tokens=8192",
    "branch_defaults.data.max_prompt_tokens=1024",
    "branch_defaults.rollout.max_new_tokens=7168",
)


@pytest.mark.parametrize(
    ("machine", "overrides", "ranks"),
    [
        (H100, SHORT, 3),
        pytest.param(TIGHT, (*SHORT, "opd.behaviour.num_states=0"), 4, marks=pytest.mark.slow),
        (with_figures(H100, {"ranks_per_node": 2}), (*SHORT, "branches.image.frozen=true"), 3),
    ],
)
def test_the_search_finds_what_trying_everything_finds(
    machine: Machine, overrides: tuple[str, ...], ranks: int
) -> None:
    inputs = two_branches(machine, *overrides)
    best, count = brute_force(inputs, ranks)
    found = search(inputs, ranks, recompute=[inputs.config.training.recompute])
    assert count > 1 and found.plan is not None
    assert found.plan.seconds == pytest.approx(best)
    assert found.plan.ranks <= ranks and not found.plan.problems
    assert all(other.seconds >= found.plan.seconds * (1 - 1e-9) for other in found.others)


def test_what_is_found_is_what_the_trainer_takes() -> None:
    found = search(two_branches(H100), 16)
    assert found.best is not None and found.plan is not None
    validate(found.best.config, found.plan.ranks, found.best.shapes)
    assert found.others and all(other.reason for other in found.others)


def test_the_hub_gets_the_ranks_that_it_needs() -> None:
    """It answers the prompts of all spokes and teaches them all."""
    inputs = inputs_of("three_branch_qwen3_vl_4b", "schedule.rlvr_steps=0")
    found = search(inputs, 40)
    assert found.plan is not None
    ranks = {branch.name: branch.ranks for branch in found.plan.branches}
    assert ranks["text"] > max(ranks["image"], ranks["video"])


def test_where_nothing_fits_the_reasons_are_given() -> None:
    found = search(inputs_of("three_branch_qwen3_vl_235b_a22b"), 24)
    assert found.plan is None and found.best is None
    assert any("GiB on a rank that has 79.1" in reason for _, reason in found.refused)


def test_recomputation_is_found_where_activations_do_not_fit() -> None:
    inputs = inputs_of("three_branch_qwen3_vl_4b", "media.video_max_pixels=null")
    small = replace(inputs, machine=with_figures(H100, {"memory_gib": 64.0}))
    plain = search(small, 12, recompute=[Recompute.none])
    found = search(small, 12)
    assert found.plan is not None and found.best is not None
    assert plain.plan is None or found.plan.seconds <= plain.plan.seconds
