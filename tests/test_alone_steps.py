"""Steps in which nothing crosses between branches: nobody waits, and all is written, agreed on and stopped
together all the same."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from copd_megatron.branch.schedule import exchange_due, steps
from copd_megatron.config import Config, load_config
from copd_megatron.errors import RunStorageError
from copd_megatron.plugins import RECIPES
from tests.support.commands import ROOT
from tests.support.distributed import run_distributed

RANKS = {"addition": (0, 1), "running_sums": (2,)}
SLOW = 0.3
"""Seconds of a step of the slower branch; the other's take none."""


def _config(run_dir: Path) -> Config:
    overrides = [f"run.dir={run_dir}", "logging.console=false", "checkpoint.save_period=0"]
    overrides += ["schedule.cycles=1", "schedule.rlvr_steps=8", "opd.behaviour.num_states=0"]
    return load_config(ROOT / "configs/two_branch_tiny.yaml", overrides)


def _branch(world: Any, config: Config) -> Any:
    """What the observer and the checkpoints need of a branch."""
    from copd_megatron.metrics.reduction import Metrics
    from copd_megatron.metrics.step_clock import StepClock

    return SimpleNamespace(
        name=world.branch, config=config, settings=config.branches[world.branch], world=world,
        run_dir=Path(config.run.dir or ""), metrics=Metrics(), clock=StepClock(), num_sampled_tokens=0,
        samples=SimpleNamespace(write_step=lambda: None, step=0), grader=SimpleNamespace(counters=dict),
        engine=None, media=None, prompts=None, actor=None,
    )  # fmt: skip


def _run(run_dir: str) -> dict[str, Any]:
    """Steps of an otherwise empty loop; a signal reaches rank 2 in the third."""
    from copd_megatron.branch.checkpoints import Checkpoints
    from copd_megatron.branch.observer import Observer
    from copd_megatron.topology.world import init_world

    config = _config(Path(run_dir))
    with init_world(RANKS, device="cpu", timeout_seconds=60, run_id="alone") as world:
        me = _branch(world, config)
        with Observer(me) as observer:
            checkpoints: Any = Checkpoints(me, observer)
            saved: list[int] = []
            checkpoints.saver = SimpleNamespace(
                pending=False, written=True, saved=True, save=saved.append, complete=lambda: True
            )
            checkpoints._saved = lambda done, accuracies: done
            begun, lead = time.monotonic(), []
            for step in steps(config.schedule):
                observer.begin(step)
                time.sleep(SLOW * (world.branch == "running_sums"))
                me.metrics.value("train/loss", step.index + world.rank / 8 if world.is_branch_first else 0.0)
                if step.index == 2 and world.rank == 2:
                    checkpoints._signals.received = "SIGTERM"
                observer.step(step, alone=True)
                lead.append(time.monotonic() - begun)
                if checkpoints.after(step, alone=True):
                    break
            checkpoints.saver.saved = False
            with pytest.raises(
                RunStorageError, match=r"after step 5 of 16 \(SIGTERM\), which could not be saved"
            ):
                checkpoints.after(dataclasses.replace(step, index=step.index + 1))
        return {"saved": saved[:1], "last": step.index, "handed_over": lead}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    ranks = run_distributed(_run, 3, args=(str(run_dir),), megatron=True)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {"ranks": ranks, "lines": lines}


def test_all_branches_stop_after_the_same_step_and_save_it(outcome: dict[str, Any]) -> None:
    assert [rank["last"] for rank in outcome["ranks"]] == [3, 3, 3], "one step after that of the signal"
    assert [rank["saved"] for rank in outcome["ranks"]] == [[4], [4], [4]]


def test_every_step_is_written_once_in_order_and_whole(outcome: dict[str, Any]) -> None:
    assert [line["step"] for line in outcome["lines"]] == [1, 2, 3, 4]
    for line in outcome["lines"]:
        assert line["running_sums/train/loss"] == line["step"] - 1 + 2 / 8
        assert "addition/timing/step_seconds" in line


def test_a_branch_does_not_wait_for_a_slower_one_within_a_step(outcome: dict[str, Any]) -> None:
    """It is one step ahead: waiting in every step would take it three slow ones to hand over the third."""
    fast, slow = (outcome["ranks"][rank]["handed_over"] for rank in (0, 2))
    assert fast[2] < slow[1] + 0.8 * SLOW and slow[2] >= 3 * SLOW


def test_what_crosses_is_known_beforehand(tmp_path: Path) -> None:
    config = _config(tmp_path)
    rlvr, copd = RECIPES.load("rlvr", "recipe"), RECIPES.load("copd", "recipe")
    due = [exchange_due(config, step) for step in steps(config.schedule)]
    assert due == [False] * 8 + [True] * 8
    assert [copd.in_step(config, step) for step in steps(config.schedule)] == due
    assert not any(rlvr.in_step(config, step) for step in steps(config.schedule))
    config.opd.behaviour.num_states, config.opd.behaviour.every_steps = 4, 3
    assert [exchange_due(config, step) for step in steps(config.schedule)][:8] == [
        index % 3 == 0 for index in range(8)
    ]
