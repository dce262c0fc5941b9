"""An objective and a recipe of a user's own: each one file and one line of configuration."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from copd_megatron.config import load_config, validate
from copd_megatron.config.schema import LossConfig
from copd_megatron.errors import ConfigError
from copd_megatron.objectives.base import ByComponent
from copd_megatron.objectives.surrogate import ClippedSurrogate
from copd_megatron.plugins import OBJECTIVES, RECIPES
from copd_megatron.records import TrainRow
from tests.example_objective import LikelyTokens
from tests.support.checkpoint_runs import prepare, write_config
from tests.support.commands import ROOT
from tests.support.warm_runs import train_warm

OWN_OBJECTIVE, OWN_RECIPE = "tests.example_objective:OBJECTIVE", "tests.example_recipe:RECIPE"


def test_files_of_the_room_are_found_by_name() -> None:
    assert OBJECTIVES.known() == ("full", "grpo", "sampled_token", "topk")
    assert RECIPES.known() == ("copd", "rlvr")
    for room in (OBJECTIVES, RECIPES):
        for name in room.known():
            assert room.load(name, "key") is not None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sampled_tokens", "opd.objective: there is no 'sampled_tokens'; did you mean 'sampled_token'?"),
        ("base", "there is no 'base'"),
        ("../x", "there is no '../x'"),
        ("nowhere_at_all:OBJECTIVE", "Python finds no module nowhere_at_all; install the package"),
        ("nowhere.at.all:OBJECTIVE", "Python finds no module nowhere.at.all"),
    ],
)
def test_a_name_that_stands_for_nothing_is_refused_before_the_start(name: str, message: str) -> None:
    config = load_config(ROOT / "configs/two_branch_tiny.yaml", [f"opd.objective={name}"])
    with pytest.raises(ConfigError) as caught:
        validate(config, None, None)
    assert message in str(caught.value)


def test_a_module_without_the_attribute_is_named() -> None:
    with pytest.raises(ConfigError, match=r"module tests\.example_recipe does not define OBJECTIVE"):
        OBJECTIVES.load("tests.example_recipe:OBJECTIVE", "opd.objective")


def test_a_recipe_that_cannot_distil_refuses_a_schedule_that_wants_to() -> None:
    config = load_config(ROOT / "configs/two_branch_tiny.yaml", ["recipe=rlvr"])
    with pytest.raises(ConfigError, match="recipe=rlvr has no stage that distils, but the schedule has 8"):
        RECIPES.load("rlvr", "recipe").check(config)
    config.schedule.opd_steps = 0
    RECIPES.load("rlvr", "recipe").check(config)


def _row(component: str, length: int, seed: int) -> TrainRow:
    rng = np.random.default_rng(seed)
    return TrainRow(
        token_ids=np.arange(length + 2, dtype=np.int32),
        prompt_length=2,
        advantages=rng.normal(size=length).astype(np.float32),
        loss_mask=np.ones(length, dtype=np.float32),
        component=component,
    )


def test_losses_of_several_objectives_add_up_each_on_its_own_rows() -> None:
    """Over two micro-batches with rows of both in other orders, and one with rows of one only."""
    rows = [_row("native" if i % 3 else "cross:b", 2 + i % 4, i) for i in range(9)]
    surrogate, likely = ClippedSurrogate(LossConfig(entropy_coefficient=0.1), 8), LikelyTokens()
    mixed = ByComponent({"native": surrogate, "cross:b": likely}).prepare(rows)
    logprobs = [torch.randn(row.response_length, requires_grad=True) for row in rows]
    entropy = [torch.rand(row.response_length) for row in rows]

    def batch(numbers: list[int]) -> tuple[Any, torch.Tensor, torch.Tensor]:
        lengths = torch.tensor([rows[i].response_length for i in numbers])
        index = torch.repeat_interleave(torch.arange(len(numbers)), lengths)
        placed = SimpleNamespace(rows=tuple(numbers), row_index_n=index)
        return placed, torch.cat([logprobs[i] for i in numbers]), torch.cat([entropy[i] for i in numbers])

    parts = [mixed(*batch(numbers)) for numbers in ([4, 0, 8, 3], [1, 6, 5], [2, 7])]
    total = sum(part.loss for part in parts)
    gradients = torch.autograd.grad(total, logprobs)

    expected = torch.zeros(())
    for name, loss in (("native", surrogate), ("cross:b", likely)):
        members = [i for i, row in enumerate(rows) if row.component == name]
        alone = loss.prepare([rows[i] for i in members])
        placed, mine, uncertain = batch(members)
        placed.rows = tuple(range(len(members)))
        expected = expected + alone(placed, mine, uncertain).loss
    torch.testing.assert_close(total, expected)
    for got, wanted in zip(gradients, torch.autograd.grad(expected, logprobs), strict=True):
        torch.testing.assert_close(got, wanted)
    assert sum(float(part.statistics["num_tokens"]) for part in parts) == sum(r.response_length for r in rows)
    assert {"policy_loss", "likely_tokens_loss"} <= set(parts[0].terms)


def test_equal_losses_are_computed_together() -> None:
    rows = [_row("native", 3, 0), _row("cross:b", 4, 1)]
    one = ByComponent({name: ClippedSurrogate(LossConfig(), 8) for name in ("native", "cross:b")})
    other = ClippedSurrogate(LossConfig(), 8)
    placed = SimpleNamespace(rows=(0, 1), row_index_n=torch.tensor([0] * 3 + [1] * 4))
    logprobs, entropy = torch.randn(7), torch.rand(7)
    got, expected = (loss.prepare(rows)(placed, logprobs, entropy) for loss in (one, other))
    assert torch.equal(got.loss, expected.loss)


@pytest.fixture(scope="module")
def metrics(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """One step of each phase with both of the user's files."""
    root = tmp_path_factory.mktemp("seams")
    prepare(root)
    config = write_config(
        root, {"alpha": {}, "beta": {}}, schedule={"cycles": 1, "rlvr_steps": 1, "opd_steps": 1}
    )
    own = [f"recipe={OWN_RECIPE}", f"opd.objective={OWN_OBJECTIVE}"]
    own += ["end.merge=false", "checkpoint.save_period=0"]
    run = train_warm(config, f"run.dir={root / 'run'}", *own)
    assert run.status == 0, run.output[-4000:]
    return [json.loads(line) for line in (root / "run/metrics.jsonl").read_text().splitlines()]


def test_a_stage_of_ones_own_changes_what_is_trained_on(metrics: list[dict[str, float]]) -> None:
    for step in metrics:
        for branch in ("alpha", "beta"):
            left_out, trained = step[f"{branch}/train/rows_left_out"], step[f"{branch}/train/num_rows"]
            assert left_out == trained or left_out == trained - 1


def test_a_loss_of_ones_own_is_used_for_cross_rows_only(metrics: list[dict[str, float]]) -> None:
    first, second = metrics
    for branch in ("alpha", "beta"):
        assert f"{branch}/train/likely_tokens" not in first, "Phase I has no cross rows"
        assert 0 < second[f"{branch}/train/likely_tokens"] < 1, "share of the update's tokens"
        # only the surrogate counts clipped tokens: few, of a second mini-batch
        assert 0 <= second[f"{branch}/train/clip_fraction"] < 0.2, "native rows keep the surrogate"
