"""Whole runs that stop and go on: by a signal, after damage, at another layout, and under a drill of kills.

The runs are ``copd train`` under torchrun, as a user starts them.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from copd_megatron.checkpoint.compare import compare_runs, metric_differences
from copd_megatron.checkpoint.manifest import complete_checkpoints, read_manifest, step_folder
from copd_megatron.checkpoint.stop import EXIT_PREEMPTED
from tests.support.checkpoint_runs import BRANCHES, NUM_STEPS, log_of, prepare, train, training, write_config

pytestmark = pytest.mark.slow  # kills and restarts whole runs: minutes on two cores

ROOT = Path(__file__).resolve().parents[1]
ONE_RANK_EACH: dict[str, dict[str, int]] = {name: {} for name in BRANCHES}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("resume")
    prepare(root)
    return root


def _steps_written(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_run_stopped_by_a_signal_goes_on_to_the_same_numbers(material: Path) -> None:
    """SIGUSR1 in the middle; then the newest two checkpoints are damaged; then the same command again."""
    config = write_config(material, ONE_RANK_EACH)
    undisturbed, stopped = material / "undisturbed", material / "stopped"
    assert train(config, undisturbed) == 0, log_of(undisturbed).read_text()[-4000:]
    with training(config, stopped, ["checkpoint.async_save=true"]) as process:
        deadline = time.monotonic() + 200
        while _steps_written(stopped) < 3 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(120) == EXIT_PREEMPTED, log_of(stopped).read_text()[-4000:]
    said = log_of(stopped).read_text()
    newest, before, *_ = complete_checkpoints(stopped)
    assert f"stopping after step {newest} of {NUM_STEPS}: SIGUSR1" in said
    assert 3 <= newest < NUM_STEPS

    flipped = step_folder(stopped, newest) / "alpha" / "__0_0.distcp"
    data = bytearray(flipped.read_bytes())
    data[len(data) // 3] ^= 16
    flipped.write_bytes(data)
    os.truncate(step_folder(stopped, before) / "beta" / "loop.json", 10)
    assert train(config, stopped) == 0, log_of(stopped).read_text()[-4000:]
    said = log_of(stopped).read_text()
    assert f"step_{newest:06d} is damaged" in said and f"step_{before:06d} is damaged" in said
    assert f"resumed from {step_folder(stopped, before - 1)}" in said
    assert compare_runs(undisturbed, stopped) == []
    rewards = [json.loads(line)["alpha/train/reward"] for line in (stopped / "metrics.jsonl").open()]
    assert len(rewards) == NUM_STEPS and any(rewards), "there was something to learn from"


def test_a_run_goes_on_at_another_layout(material: Path) -> None:
    """Saved at TP 2, resumed at PP 2: metrics equal from then on, optimizer included. On the way the second
    run comes near its wall-clock limit, saves and stops."""
    tensor = {**ONE_RANK_EACH, "alpha": {"tensor_model_parallel_size": 2}}
    pipeline = {**ONE_RANK_EACH, "alpha": {"pipeline_model_parallel_size": 2}}
    first, second = material / "tensor", material / "pipeline"
    assert train(write_config(material, tensor), first) == 0, log_of(first).read_text()[-4000:]
    (second / "checkpoints").mkdir(parents=True)
    shutil.copytree(step_folder(first, 3), step_folder(second, 3))
    shutil.copyfile(first / "metrics.jsonl", second / "metrics.jsonl")
    config = write_config(material, pipeline)
    limit = ["checkpoint.wall_clock_limit_seconds=1", "checkpoint.save_period=0"]
    assert train(config, second, limit) == EXIT_PREEMPTED, log_of(second).read_text()[-4000:]
    assert f"stopping after step 4 of {NUM_STEPS}: the wall-clock limit is near" in log_of(second).read_text()
    assert list(complete_checkpoints(second)) == [4, 3]
    assert train(config, second) == 0, log_of(second).read_text()[-4000:]
    assert read_manifest(step_folder(second, NUM_STEPS)).branches["alpha"].layout["pp"] == 2
    assert metric_differences(first, second, relative=1e-5) == []


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("in_background", [False, True])
def test_kills_change_nothing(material: Path, tmp_path: Path, in_background: bool) -> None:
    """A rank, a branch, the job and its launcher killed: in a save, in an exchange, at random instants."""
    parallel = {**ONE_RANK_EACH, "alpha": {"tensor_model_parallel_size": 2}}
    config = write_config(material, parallel, checkpoint={"async_save": in_background})
    command = [sys.executable, str(ROOT / "tools" / "fault_drill.py"), str(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1"}
    drill = subprocess.run(
        [*command, "--kills", "4", "--seed", "1", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    assert drill.returncode == 0, drill.stdout + drill.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["kills"]) == 4
    assert report["num_in_saves"] >= 1 and report["num_in_exchanges"] >= 1
