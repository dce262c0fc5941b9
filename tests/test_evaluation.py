"""What a model scores, and the table that shows it, for grades of 0 and 1 and for others."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from copd_megatron.config.schema import AdvantageConfig, BranchConfig, Config, RolloutConfig
from copd_megatron.evaluation.table import Score, render_table, save_table, table_title
from copd_megatron.records import Prompt, Rollout
from copd_megatron.report.history import read_run
from tests.support.rollouts import rollout

ROWS: dict[str, dict[str, Score]] = {
    "base": {"text": 0.5, "video": 0.0},
    "merged": {"text": 0.75, "video": {"mean_reward": 0.5, "full_marks": 0.25}},
}


def graded(reward: float | None) -> Rollout:
    return dataclasses.replace(rollout("x"), reward=reward)


@pytest.mark.parametrize(
    ("rewards", "score"),
    [
        ([1.0, 0.0, 0.0, 1.0], 0.5),
        ([1.0, 0.5, 0.0, 0.5], {"mean_reward": 0.5, "full_marks": 0.25}),
        ([-1.0, 3.0], {"mean_reward": 1.0, "full_marks": 0.5}),
    ],
)
def test_score_of_rewards(rewards: list[float], score: Score) -> None:
    from copd_megatron.evaluation.run import score_of

    assert score_of(rewards) == score


def test_a_prompt_is_solved_by_half_of_its_responses() -> None:
    from copd_megatron.evaluation.run import solved

    def answers(name: str, *rewards: float | None) -> list[Rollout]:
        prompt = dataclasses.replace(rollout("x").prompt, prompt_id=name)
        return [dataclasses.replace(graded(reward), prompt=prompt) for reward in rewards]

    rollouts = [
        *answers("a", 1.0, 0.0),
        *answers("b", 1.0, 0.5, 0.0),
        *answers("c", None),
        *answers("d", 2.0),
    ]
    assert solved(rollouts) == {"a", "d"}


def test_responses_without_a_grade_are_left_out() -> None:
    from copd_megatron.evaluation.run import accuracy

    def sample(prompts: Sequence[Prompt], settings: Any, purpose: str) -> list[Rollout]:
        return [graded(reward) for reward in ([1.0, None, 0.0] if "text" in purpose else [None])]

    config = Config(branches={"text": BranchConfig(), "image": BranchConfig()})
    scores = accuracy(sample, {"text": [], "image": []}, config)
    assert scores["text"] == 0.5
    assert isinstance(scores["image"], float) and math.isnan(scores["image"])


def test_a_domain_is_answered_at_its_own_length_whichever_branch_comes_first() -> None:
    from copd_megatron.evaluation.run import accuracy

    longest: dict[str, int | None] = {}

    def sample(prompts: Sequence[Prompt], settings: Any, purpose: str) -> list[Rollout]:
        longest[purpose] = settings.max_new_tokens
        return [graded(1.0)]

    branches = {
        name: BranchConfig(rollout=RolloutConfig(max_new_tokens=tokens))
        for name, tokens in (("text", 64), ("image", 512))
    }
    accuracy(sample, {"text": [], "image": []}, Config(branches=branches))
    assert longest == {"validation/text": 64, "validation/image": 512}


def test_graded_domains_have_a_reward_and_full_marks() -> None:
    assert render_table(ROWS, ["text", "video"], num_prompts={"video": 8}).splitlines() == [
        "model   text  video (n=8) reward  video full marks  mean",
        "------  ----  ------------------  ----------------  ----",
        "base    50.0               0.000               0.0  25.0",
        "merged  75.0               0.500              25.0  62.5",
    ]
    assert table_title(ROWS) == "validation accuracy (%), mean reward where graded"
    assert table_title({"base": {"text": 0.5}}) == "validation accuracy (%)"


def test_rewards_on_any_scale() -> None:
    rows: dict[str, dict[str, Score]] = {
        "base": {"text": 0.5, "game": {"mean_reward": -3.25, "full_marks": 0.0}},
        "merged": {"text": 0.5, "game": {"mean_reward": 12.0, "full_marks": 1.0}},
    }
    lines = render_table(rows, ["text", "game"]).splitlines()
    assert lines[2].split() == ["base", "50.0", "-3.250", "0.0", "-"]
    assert lines[3].split() == ["merged", "50.0", "12.000", "100.0", "-"]


def test_saved_tables_and_the_report_tell_them_apart(tmp_path: Path) -> None:
    save_table(tmp_path, ROWS, ["text", "video"])
    saved = json.loads((tmp_path / "evaluation.json").read_text())
    assert saved["accuracy"]["merged"] == {"text": 0.75, "video": None, "mean": 0.625}
    assert saved["mean_reward"] == {"base": {"video": 0.0}, "merged": {"video": 0.5}}
    assert saved["full_marks"] == {"base": {"video": 0.0}, "merged": {"video": 0.25}}
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    history = read_run(tmp_path)
    assert history.accuracy["merged"] == {"text": 0.75, "video": 0.5, "mean": 0.625}


def test_ungraded_responses_are_out_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    from copd_megatron.branch import native
    from copd_megatron.branch.sampling import graded_only, reward_metrics
    from copd_megatron.metrics.reduction import Metrics

    rollouts = [graded(reward) for reward in (1.0, None, 0.5, None)]
    monkeypatch.setattr(native, "_fresh_groups", lambda *_, **__: rollouts)
    me = SimpleNamespace(
        config=Config(advantage=AdvantageConfig(dynamic_sampling=False)),
        settings=SimpleNamespace(num_prompts_per_step=1),
        metrics=Metrics(),
        samples=SimpleNamespace(note=lambda *_: None),
    )
    kept = native.sample_native(cast(Any, me), cast(Any, None))
    assert [r.reward for r in kept] == [1.0, 0.5] == [r.reward for r in graded_only(rollouts)]
    reward_metrics(cast(Any, me), "again/", rollouts)
    assert me.metrics.reduce()["train/reward"] == 0.75


def test_verdicts_belong_to_shards_as_they_are(tmp_path: Path) -> None:
    """A shard written anew under the same name is another."""
    from copd_megatron.evaluation.models import _states

    shard = tmp_path / "t-000000.tar"
    shard.write_bytes(b"one")
    before = _states([str(shard)])
    assert before == _states([str(shard)])
    shard.write_bytes(b"two")
    assert before != _states([str(shard)])
