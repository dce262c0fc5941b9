"""The table of a run: its rows, what they may be compared with, and where its figures go."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from copd_megatron.config import BranchConfig, Config, DataConfig, EvaluationConfig, ModelConfig
from copd_megatron.config.domains import evaluated_as
from copd_megatron.config.schema import PoolConfig
from copd_megatron.evaluation.run import score_of
from copd_megatron.metrics.prometheus import PrometheusTextfile
from copd_megatron.metrics.writers import JsonlWriter, TensorBoardWriter
from copd_megatron.records import MediaRef, Prompt
from copd_megatron.untrusted.json_text import dumped, load


def _config(**branches: BranchConfig) -> Config:
    return Config(model=ModelConfig(path="/m/base"), branches=branches)


def _branch(data: str | None = None, **settings: Any) -> BranchConfig:
    return BranchConfig(data=DataConfig(validation=[] if data is None else [data]), **settings)


def test_a_domain_that_branches_share_is_evaluated_once() -> None:
    config = _config(
        text=_branch("text.tar", frozen=True),
        image=_branch("image.tar", frozen=True),
        student=_branch("text.tar"),
        silent=_branch(),
    )
    assert evaluated_as(config) == {"text": "text", "image": "image", "student": "text"}
    config.branches["student"].data.pools = {"sums": PoolConfig(validation=["text.tar"]), "own": PoolConfig()}
    assert evaluated_as(config) == {"text": "text", "image": "image", "sums": "text"}, "pools too"
    config.branches["student"].data.pools = {}
    config.branches["student"].data.max_prompt_tokens += 1
    assert evaluated_as(config)["student"] == "student", "it may be left with other prompts"


class _World:
    """As many branches as are asked for, of one rank each, taking turns at a collective."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = parts

    def all_gather_objects(self, mine: Any, name: str) -> Sequence[Any]:
        return [mine, *self.parts]


def _me(monkeypatch: pytest.MonkeyPatch, config: Config, name: str, others: Sequence[Any]) -> Any:
    from copd_megatron.branch import validation

    monkeypatch.setattr(validation, "_accuracy", lambda me, model, domains: dict.fromkeys(domains, 0.5))
    return SimpleNamespace(
        name=name,
        config=config,
        settings=config.branches[name],
        world=_World(others),
        validation={"text": [], "image": [], "video": []},
    )


def test_there_is_a_row_for_every_starting_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from copd_megatron.branch.validation import starting_models

    config = _config(
        text=_branch("t"),
        image=_branch("i", model_path="/m/expert"),
        video=_branch("v"),
        old=_branch(frozen=True),
    )
    others = [("base", {"image": 0.25}), ("base of image", {"text": 0.0, "image": 1.0, "video": 0.0})]
    me = _me(monkeypatch, config, "text", others)
    assert starting_models(me, trained=False) == {
        "base": {"text": 0.5, "image": 0.25, "video": 0.5},
        "base of image": {"text": 0.0, "image": 1.0, "video": 0.0},
    }


def test_branches_that_were_trained_load_what_they_started_from(monkeypatch: pytest.MonkeyPatch) -> None:
    from copd_megatron.branch import validation

    done: list[str] = []
    monkeypatch.setattr(validation, "load_folder", lambda me, folder: done.append(f"load {folder}"))
    monkeypatch.setattr(validation, "sync_weights", lambda me: done.append("sync"))
    config = _config(text=_branch("t"), image=_branch("i", model_path="/m/expert"))
    validation.starting_models(_me(monkeypatch, config, "image", []), trained=True)
    assert done == ["load /m/expert", "sync"]


MEDIUM = MediaRef(
    source="text/validation", shard="s", key="0", extension="0.png", kind="image", content_hash="9f"
)


def _prompt(**changes: Any) -> Prompt:
    prompt = Prompt(
        prompt_id="a/1", domain="text", token_ids=np.arange(3, dtype=np.int32), answer="1", verifier="exact"
    )
    return dataclasses.replace(prompt, **changes)


@pytest.mark.parametrize(
    ("options", "prompts"),
    [
        ({}, [_prompt(metadata={"tolerance": 0.1})]),
        ({}, [_prompt(media=(MEDIUM,))]),
        ({"temperature": 0.5}, [_prompt()]),
        ({"num_generations_per_prompt": 2}, [_prompt()]),
        ({}, [_prompt(), _prompt(prompt_id="a/2")]),
        ({}, [_prompt(token_ids=np.arange(4, dtype=np.int32))]),
        ({}, [_prompt(answer="2")]),
        ({}, []),
    ],
    ids=[
        *("metadata", "media", "temperature", "samples", "more prompts", "another template", "other answers"),
        "fewer prompts",
    ],
)
def test_rows_are_comparable_only_under_the_same_conditions(
    options: Mapping[str, Any], prompts: list[Prompt]
) -> None:
    assert _under({}, [_prompt()]) == _under({"at_start": False, "every_steps": 3}, [_prompt()])
    assert _under({}, [_prompt()]) != _under(options, prompts)


def _under(options: Mapping[str, Any], prompts: list[Prompt], **model: Any) -> str:
    from copd_megatron.branch.validation import conditions

    config = _config(text=_branch())
    config.evaluation = EvaluationConfig(**options)
    config.model = ModelConfig(path="m", **model)
    me = SimpleNamespace(config=config, settings=config.branches["text"], validation={"text": prompts})
    return conditions(cast(Any, me))


def test_rows_of_a_verifier_that_was_corrected_since_are_not_comparable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    module = tmp_path / "my_verifier_of_a_table.py"
    found = []
    for reward in (0.0, 1.0, 1.0):
        module.write_text(f"def grade(response, answer, metadata):\n    return {reward}\n")
        found.append(_under({}, [_prompt(verifier="my_verifier_of_a_table:grade")]))
    assert found[0] != found[1] == found[2]
    assert _under({}, [_prompt()]) != _under({}, [_prompt()], dtype="float32")


def test_a_domain_of_which_nothing_was_graded_is_remembered_as_such() -> None:
    from copd_megatron.branch.checkpoints import _mean_accuracy, _table_of

    table: Any = {"base": {"text": score_of([]), "image": score_of([0.5, 2.0])}, "text": {"text": 0.25}}
    again = _table_of(load(dumped(table)))
    assert math.isnan(cast(float, again["base"].pop("text"))) and again["text"] == table["text"]
    assert again["base"] == {"image": {"mean_reward": 1.25, "full_marks": 0.5}}
    assert _mean_accuracy(table) is None, "it could not be compared with a mean over all domains"
    assert _mean_accuracy({"text": {"text": 0.25, "image": 0.75}}) == 0.5


def test_evaluation_counts_as_nothing_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from copd_megatron.branch import validation
    from copd_megatron.metrics.reduction import Metrics
    from copd_megatron.metrics.step_clock import StepClock
    from copd_megatron.rewards.grader import Grader

    def sample(me: Any, *_: Any, **__: Any) -> list[Any]:
        me.num_sampled_tokens += 1000
        me.metrics.maximum("timing/generation_seconds", 99.0)
        me.grader.restore_counters({"graded": 50})
        return [SimpleNamespace(reward=1.0)]

    monkeypatch.setattr(validation, "sample_graded", sample)
    grader = Grader.__new__(Grader)
    grader.restore_counters({"graded": 7})
    metrics = Metrics()
    metrics.maximum("timing/generation_seconds", 1.0)
    me: Any = SimpleNamespace(
        config=_config(text=_branch("t")),
        validation={"text": [_prompt()]},
        engine=SimpleNamespace(num_replicas=1, llm=SimpleNamespace(reset_prefix_cache=lambda: True)),
        metrics=metrics,
        num_sampled_tokens=3,
        clock=StepClock(),
        samples=SimpleNamespace(write_evaluation=lambda *_: None),
        grader=grader,
        name="another branch",
    )
    assert validation._accuracy(me, "text", ["text"]) == {"text": 1.0}
    assert me.num_sampled_tokens == 3 and me.clock.lap()[1]["evaluation"] > 0
    assert me.grader.counters() == {"graded": 7, "failed": 0}
    assert me.metrics.reduce() == {"timing/generation_seconds": 1.0}


def test_the_final_figures_stand_where_the_curves_are(tmp_path: Path) -> None:
    figures = {"final/accuracy/merged/text": 0.75, "final/accuracy/base of image/text": 0.5}
    textfile, jsonl = PrometheusTextfile(tmp_path / "copd.prom", run="r"), JsonlWriter(tmp_path / "m.jsonl")
    board = TensorBoardWriter(tmp_path / "board")
    for writer in (textfile, jsonl, board):
        writer.write(6, "opd", {"text/train/reward": 0.41})
        writer.finish(6, figures)
        writer.close()
    text = (tmp_path / "copd.prom").read_text()
    assert 'copd_final_accuracy{domain="text",model="merged",run="r"} 0.75' in text
    assert 'copd_train_reward{branch="text",run="r"} 0.41' in text, "the last step stays"
    assert [json.loads(line)["step"] for line in (tmp_path / "m.jsonl").open()] == [6], "a line is a step"
    assert any(b"final/accuracy/merged/text" in path.read_bytes() for path in (tmp_path / "board").iterdir())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_resumed_with_other_prompts_measures_all_rows_with_them(tmp_path: Path) -> None:
    """As if it had been run with them from its beginning."""
    from copd_megatron.checkpoint.compare import file_differences
    from copd_megatron.checkpoint.manifest import step_folder
    from tests.support.checkpoint_runs import BRANCHES, log_of, prepare, train, write_config

    prepare(tmp_path)
    config = write_config(tmp_path, {name: {} for name in BRANCHES}, schedule={"cycles": 1})
    whole, few, resumed = tmp_path / "whole", tmp_path / "few", tmp_path / "resumed"
    assert train(config, whole) == 0, log_of(whole).read_text()[-4000:]
    assert train(config, few, ["evaluation.max_prompts=2"]) == 0, log_of(few).read_text()[-4000:]
    (resumed / "checkpoints").mkdir(parents=True)
    shutil.copytree(step_folder(few, 2), step_folder(resumed, 2))
    shutil.copyfile(few / "metrics.jsonl", resumed / "metrics.jsonl")
    assert train(config, resumed) == 0, log_of(resumed).read_text()[-4000:]
    assert "they are measured again" in log_of(resumed).read_text()
    assert file_differences(whole, resumed) == []
    tables = [json.loads((run / "evaluation.json").read_text()) for run in (few, whole)]
    assert tables[0]["num_prompts"] != tables[1]["num_prompts"]
