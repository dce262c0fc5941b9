"""A local run that loses a rank, its disk, or its vLLM: it starts again by itself, says what happened, loses
nothing.

The same faults on a cluster, and more of them: ``test_slurm.py``.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from copd_megatron.checkpoint.compare import compare_runs
from copd_megatron.checkpoint.manifest import complete_checkpoints
from tests.support.checkpoint_runs import (
    BRANCHES,
    log_of,
    prepare,
    rank_process,
    train,
    training,
    until,
    write_config,
)
from tests.support.disks import fill

VLLM_FAULT = Path(__file__).with_name("vllm_fault")
NUM_CYCLES = 4
NUM_STEPS = 3 * NUM_CYCLES
"""For seconds after the first checkpoint there are more to come."""
TIMEOUT_SECONDS = 75
"""Of a collective; longer than any part of the start takes on a busy machine."""


@pytest.mark.parametrize(
    ("ends_with", "status", "starts"),
    [([9, 0], 0, 2), ([75], 75, 1)],
    ids=["failed", "told to stop"],
)
def test_a_local_launch_starts_again_what_failed(
    tmp_path: Path, ends_with: list[int], status: int, starts: int
) -> None:
    """Real torchruns of a rank that ends as it is told, at most one restart."""
    rank = tmp_path / "rank.py"
    rank.write_text(
        "import os, sys\n"
        "restart = int(os.environ['COPD_RESTART_COUNT'])\n"
        "open(os.environ['STARTS'], 'a').write('x')\n"
        f"sys.exit({ends_with}[restart])\n"
    )
    launch = subprocess.run(
        [sys.executable, "-m", "copd_megatron.launch.local", str(tmp_path), "--standalone", str(rank)],
        env=os.environ | {"COPD_MAX_RESTARTS": "1", "STARTS": str(tmp_path / "starts")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert launch.returncode == status, launch.stderr
    assert (tmp_path / "starts").read_text() == "x" * starts
    assert ("copd: ended: rank 0 with 9; restart 1 of 1" in launch.stderr) == (starts == 2)


# --- whole runs: minutes on two cores -----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Runs:
    """A configuration, and what it gives when nothing happens."""

    config: Path
    undisturbed: Path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("runs")
    prepare(root)
    config = write_config(
        root,
        {name: {} for name in BRANCHES},
        schedule={"cycles": NUM_CYCLES},
        checkpoint={"save_period": 1, "keep_last": 2},
    )
    undisturbed = root / "undisturbed"
    assert train(config, undisturbed) == 0, log_of(undisturbed).read_text()[-4000:]
    return Runs(config=config, undisturbed=undisturbed)


@pytest.fixture
def disk(make_disk: Callable[[int], Path]) -> Path:
    return make_disk(256 << 20)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_killed_rank_and_a_full_disk_lose_nothing(runs: Runs, tmp_path: Path, disk: Path) -> None:
    run_dir = tmp_path / "run"
    (disk / "run").mkdir()
    run_dir.symlink_to(disk / "run")  # the log beside it is elsewhere

    with training(runs.config, run_dir, ["run.max_restarts=1"]) as process:
        until(lambda: len(complete_checkpoints(run_dir)) >= 2, process, run_dir)
        os.kill(rank_process(run_dir, 1), signal.SIGKILL)
        until(lambda: "resumed from" in log_of(run_dir).read_text(), process, run_dir)
        filler = fill(disk)
        assert process.wait(300) != 0
    said = log_of(run_dir).read_text()
    assert "restart 1 of 1" in said and "rank 1 with -9" in said
    last = said.strip().splitlines()[-3:]
    assert last[0].startswith("copd: the run ended: alpha rank 0 (global rank 0): RunStorageError: "), last
    assert "No space left on device); free some space" in last[0]
    saved = next(iter(complete_checkpoints(run_dir)))
    assert last[1] == f"copd: when that is mended, the same command continues from step {saved}"
    assert "Traceback" not in said.rpartition("resumed from")[2], "one sentence is enough"
    newest = next(iter(complete_checkpoints(run_dir)))
    assert 1 <= newest < NUM_STEPS

    assert train(runs.config, run_dir) == 2, "there is no room for the run"
    assert "free some, choose another run.dir" in log_of(run_dir).read_text()
    filler.unlink()
    assert train(runs.config, run_dir) == 0, log_of(run_dir).read_text()[-4000:]
    assert f"step_{newest:06d}, {newest} of {NUM_STEPS} steps done" in log_of(run_dir).read_text()
    assert compare_runs(runs.undisturbed, run_dir) == []


def _disturbed(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, *overrides: str
) -> tuple[Path, str]:
    """A run whose rank 1, the only one of branch beta, has ``fault`` in its vLLM after the first checkpoint,
    and that ends as if it had not; its directory and what it has said."""
    path = [str(VLLM_FAULT), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    monkeypatch.setenv("VLLM_FAULT_DIR", str(tmp_path))
    run_dir, trigger = tmp_path / "run", tmp_path / f"rank_1.{fault}"
    with training(runs.config, run_dir, ["run.max_restarts=1", *overrides]) as process:
        until(lambda: len(complete_checkpoints(run_dir)) >= 1, process, run_dir)
        trigger.touch()
        until(lambda: not trigger.exists(), process, run_dir)
        assert process.wait(300) == 0, log_of(run_dir).read_text()[-6000:]
    said = log_of(run_dir).read_text()
    before, _, after = said.partition("restart 1 of 1")
    assert re.search(rf"resumed from .*, \d+ of {NUM_STEPS} steps done", after), said
    # the processor itself changes nothing: the undisturbed run had none
    assert compare_runs(runs.undisturbed, run_dir) == []
    return run_dir, before


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_vllm_that_fails_is_named_and_loses_nothing(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, said = _disturbed(runs, tmp_path, monkeypatch, "raise")
    assert re.search(
        r"RolloutError: branch beta, rollout replica 0 \(branch rank 0\): vLLM failed in sampling \d+ "
        r"responses of step \d+: RuntimeError: the logits could not be processed",
        said,
    ), said
    assert "vllm_fault.py" in said, "vLLM's own traceback"
    assert re.search(r"copd: ended: .*rank 1 with 1", said), said


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_vllm_that_hangs_is_named_and_loses_nothing(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = f"run.collective_timeout_seconds={TIMEOUT_SECONDS}"
    run_dir, said = _disturbed(runs, tmp_path, monkeypatch, "hang", limit)
    assert re.search(r"beta rank 0 \(global rank 1\) in operation 'rollout.generate' without progress", said)
    report, _, stacks = (run_dir / "stuck_rank_00001.txt").read_text().partition("stacks:")
    headline = (
        r"watch: beta rank 0 \(global rank 1\) in operation 'rollout.generate' without progress for \d+ s "
        rf"\(limit {TIMEOUT_SECONDS} s\)"
    )
    assert re.match(headline, report), report
    # either rank may be the first at its limit, and speak for both
    other = (run_dir / "stuck_rank_00000.txt").read_text()
    assert (
        "waiting for: nobody; no other rank takes part in this, so this one is stuck by itself" in report
        or "waiting for: beta rank 0 (global rank 1, in rollout.generate for" in other
    ), report + other
    assert "in _never_return" in stacks and "v1/sample/sampler.py" in stacks, stacks
    assert re.search(r"copd: ended: .*rank \d with 86", said), said
