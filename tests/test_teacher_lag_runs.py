"""Whole runs with ``opd.max_teacher_lag=1``: their numbers depend on neither the branches' speed nor on where
they were stopped. Minutes on two cores."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from copd_megatron.checkpoint.compare import compare_runs
from copd_megatron.checkpoint.manifest import complete_checkpoints, step_folder
from copd_megatron.checkpoint.stop import EXIT_PREEMPTED
from tests.support.checkpoint_runs import (
    log_of,
    prepare,
    steps_written,
    train,
    training,
    until,
    write_config,
)
from tests.support.warm_runs import train_warm

pytestmark = pytest.mark.slow

SCHEDULE = {"cycles": 1, "rlvr_steps": 1, "opd_steps": 5}
LAG = ["opd.max_teacher_lag=1", "training.max_weight_lag=1", "evaluation.every_steps=3"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lag")
    prepare(root)
    return write_config(root, {"alpha": {}, "beta": {}}, schedule=SCHEDULE)


@pytest.fixture(scope="module")
def whole(config: Path) -> Path:
    return _run(config, "whole")


def _run(config: Path, name: str, *overrides: str) -> Path:
    run = train_warm(config, f"run.dir={config.parent / name}", *LAG, *overrides, timeout=900)
    assert run.status == 0, run.output[-4000:]
    return config.parent / name


def _lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_rows_are_one_update_old_from_the_second_step_of_a_phase_on(whole: Path) -> None:
    opd = [line for line in _lines(whole) if line["phase"] == "opd"]
    for edge, name in (("alpha<-beta", "alpha"), ("beta<-alpha", "beta")):
        assert [line[f"copd/sample_lag/{edge}"] for line in opd] == [0, 1, 1, 1, 1]
        # a snapshot of the phase's start
        assert {line[f"copd/teacher_version/{edge}"] for line in opd} == {1}
        assert {line[f"{name}/perf/steps_ahead"] for line in _lines(whole)[1:]} <= {0, 1}
        ratios = [line[f"{name}/train/ratio"] for line in opd]
        assert all(0.5 < ratio < 2 for ratio in ratios) and any(ratio != 1 for ratio in ratios[1:])


@pytest.mark.parametrize("done", [1, 2, 4])
def test_a_run_goes_on_from_any_step_to_the_same_numbers(config: Path, whole: Path, done: int) -> None:
    """After Phase I, nothing is open; in Phase II, the next step's questions are."""
    halved = config.parent / f"from_{done}"
    (halved / "checkpoints").mkdir(parents=True)
    shutil.copytree(step_folder(whole, done), step_folder(halved, done))
    shutil.copyfile(whole / "metrics.jsonl", halved / "metrics.jsonl")
    assert (step_folder(halved, done) / "alpha/asked.bin").exists() == (done > 1)
    _run(config, halved.name)
    assert compare_runs(whole, halved) == []


def test_numbers_do_not_depend_on_who_is_slow(
    config: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.support.uneven_recipe import SECONDS

    monkeypatch.setenv(SECONDS, "1.5")
    uneven = _run(config, "uneven", "recipe=tests.support.uneven_recipe:RECIPE", "evaluation.every_steps=0")
    plain = _run(config, "even", "evaluation.every_steps=0")
    assert compare_runs(plain, uneven) == []


def test_a_run_stopped_within_a_phase_goes_on_to_the_same_numbers(config: Path, whole: Path) -> None:
    """By a signal, under the launcher, with questions open between the branches."""
    stopped = config.parent / "stopped"
    with training(config, stopped, [*LAG, "checkpoint.save_period=0"]) as process:
        until(lambda: steps_written(stopped) >= 1, process, stopped, 600)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(300) == EXIT_PREEMPTED, log_of(stopped).read_text()[-4000:]
    ((done, manifest),) = complete_checkpoints(stopped).items()
    assert 2 <= done < 6
    assert any(file.path == "alpha/asked.bin" for file in manifest.files)
    assert train(config, stopped, [*LAG, "checkpoint.save_period=0"], timeout=900) == 0
    assert compare_runs(whole, stopped) == []
