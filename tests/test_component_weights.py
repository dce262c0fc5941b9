"""Weights of the loss's components: shares of the gradient budget, and distillation without native rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from copd_megatron.config import load_config, validate
from copd_megatron.config.graph import build_graph
from copd_megatron.config.schema import Aggregation, LossConfig
from copd_megatron.errors import ConfigError
from copd_megatron.objectives.shares import advantage_shares
from copd_megatron.records import TrainRow
from tests.support.checkpoint_runs import prepare, write_config
from tests.support.warm_runs import train_warm

ROOT = Path(__file__).resolve().parents[1]


def _row(component: str, advantages: list[float], mask: list[int], weight: float = 1.0) -> TrainRow:
    return TrainRow(
        token_ids=np.zeros(len(mask) + 1, dtype=np.int32),
        prompt_length=1,
        advantages=np.array(advantages, dtype=np.float32),
        loss_mask=np.array(mask, dtype=np.float32),
        component=component,
        component_weight=weight,
    )


def test_shares_are_those_of_weight_times_advantage() -> None:
    """By hand, sequence means: native (|1| + |-1|) / 2 / 2 + |0.5| / 2 = 0.75; cross 3 * |0.25| = 0.75."""
    rows = [
        _row("native", [1.0, -1.0, 9.0], [1, 1, 0]),
        _row("native", [0.5], [1]),
        _row("cross:b", [0.25, -0.25], [1, 1], weight=3.0),
    ]
    assert advantage_shares(rows, LossConfig(), 8) == pytest.approx({"native": 0.5, "cross:b": 0.5})
    tokens = LossConfig(aggregation=Aggregation.token_mean)
    # native 2.5 / 3 tokens, cross 3 * 0.25
    expected = {"native": 2.5 / 3, "cross:b": 0.75}
    total = sum(expected.values())
    assert advantage_shares(rows, tokens, 8) == pytest.approx({k: v / total for k, v in expected.items()})


def test_without_advantages_all_shares_are_zero() -> None:
    assert advantage_shares([_row("native", [0.0], [1])], LossConfig(), 8) == {"native": 0.0}
    assert advantage_shares([], LossConfig(), 8) == {}


def test_weights_stand_in_the_graph_and_in_the_dry_run() -> None:
    own = ["opd.weight=0.5", "opd.edges=[{student: addition, teacher: running_sums, weight: 0}]"]
    graph = build_graph(load_config(ROOT / "configs/two_branch_tiny.yaml", own))
    assert {edge.name: edge.weight for edge in graph.edges} == {
        "addition<-running_sums": 0.0,
        "running_sums<-addition": 0.5,
    }
    assert "running_sums<-addition  sampled_token, weight 0.5, beta 0.3" in graph.describe()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("native.weight=-1", r"native\.weight"),
        (
            "native.weight=0",
            "native.weight: 0 leaves nothing to learn in Phase I, but schedule.rlvr_steps=12",
        ),
        ("opd.weight=-0.5", r"opd\.weight: -0\.5 must be at least 0"),
        ("opd.weight=.nan", "weight"),
    ],
)
def test_weights_that_make_no_sense_are_refused(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(load_config(ROOT / "configs/two_branch_tiny.yaml", [setting]), None, None)


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """Static distillation: a frozen teacher, and a student that samples no prompts of its own."""
    root = tmp_path_factory.mktemp("static")
    prepare(root)
    schedule = {"cycles": 1, "rlvr_steps": 0, "opd_steps": 2}
    config = write_config(root, {"alpha": {}, "beta": {}}, schedule=schedule)
    settings = ["native.weight=0", "branches.beta.frozen=true", "opd.weight=0.5", "checkpoint.save_period=0"]
    run = train_warm(config, f"run.dir={root / 'run'}", *settings)
    assert run.status == 0, run.output[-4000:]
    return [json.loads(line) for line in (root / "run/metrics.jsonl").read_text().splitlines()]


def test_native_weight_zero_leaves_no_native_row_in_the_update(static: list[dict[str, float]]) -> None:
    assert len(static) == 2
    for step in static:
        assert "alpha/train/reward" not in step
        shares = {name for name in step if name.startswith("alpha/train/advantage_share/")}
        assert shares == {"alpha/train/advantage_share/cross/beta"}
        assert step["alpha/train/num_rows"] == 3 * 4, "cross prompts x samples"


def test_pure_distillation_is_measured_on_what_the_student_visits(static: list[dict[str, float]]) -> None:
    for step in static:
        assert 0 < step["copd/overlap@10/alpha-beta"] <= 1
        assert step["copd/sym_kl/alpha-beta"] >= 0


def test_a_teacher_equal_to_its_student_says_nothing(static: list[dict[str, float]]) -> None:
    """Through vLLM, Megatron and the router: both start from one base, so delta is rounding at most."""
    first = static[0]
    assert abs(first["copd/teacher_gap/alpha<-beta"]) < 1e-6
    assert first["copd/sym_kl/alpha-beta"] < 1e-6
    assert first["copd/overlap@10/alpha-beta"] == 1.0
    assert first["alpha/train/grad_norm"] < 1e-3
