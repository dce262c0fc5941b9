"""A local run on a machine whose /dev/shm is full, or fills up: it says what, where and the remedy, and ends.

In a mount namespace of its own, so that it is a real tmpfs and nobody else's.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.checkpoint_runs import prepare, write_config
from tests.support.commands import ROOT, environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
_MOUNT = "mount -t tmpfs -o size={size} copd-test /dev/shm"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    mounted = subprocess.run(["unshare", "-m", "sh", "-c", _MOUNT.format(size="4k")], capture_output=True)
    if mounted.returncode:
        pytest.skip("this process may not mount a file system")
    root = tmp_path_factory.mktemp("runs")
    prepare(root)
    return write_config(
        root,
        {"alpha": {"tensor_model_parallel_size": 2}, "beta": {}},
        schedule={"cycles": 1},
    )


def run_with(size: str, config: Path, run_dir: Path, before: str) -> subprocess.CompletedProcess[str]:
    """``copd train`` where /dev/shm is a tmpfs of that size, after ``before`` has done something there."""
    command = [
        *(sys.executable, "-m", "copd_megatron.cli", "train", str(config), f"run.dir={run_dir}"),
        "branches.alpha.rollout.tensor_parallel_size=2",
    ]
    script = f"{_MOUNT.format(size=size)} && {{ {before} }} && {shlex.join(command)}"
    return subprocess.run(
        ["unshare", "-m", "sh", "-c", script],
        capture_output=True,
        text=True,
        timeout=1200,
        env=environment(PYTHONWARNINGS="ignore"),
        cwd=ROOT,
        check=False,
    )


def test_what_killed_runs_left_is_named_before_the_start(config: Path, tmp_path: Path) -> None:
    done = run_with("256m", config, tmp_path / "run", "head -c 200m /dev/zero > /dev/shm/psm_stale;")
    assert done.returncode == 2, done.stderr[-3000:]
    assert "/dev/shm: 56 MiB free, 3 ranks on this machine need about 192; " in done.stderr
    assert "no process seen from here uses 200 MiB" in done.stderr
    assert "rm /dev/shm/psm_stale; or give the container more (docker run --shm-size=8g" in done.stderr
    assert "Traceback" not in done.stderr


def test_shared_memory_that_fills_up_during_the_start_is_the_cause(config: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    started = f"for try in $(seq 3000); do ls {run_dir}/logs/rank_* && break; sleep 0.2; done"
    filled = f"( {started}; cat /dev/zero > /dev/shm/filler ) > /dev/null 2>&1 &"
    done = run_with("256m", config, run_dir, filled)
    assert done.returncode in (1, 78), done.stderr[-6000:]
    cause, _, more = done.stderr.strip().splitlines()[-3:]
    assert cause.startswith("copd: the run ended: ") and "/dev/shm" in cause, done.stderr[-6000:]
    assert "free space of /dev/shm" in cause or "--shm-size" in cause
    assert more.startswith("copd: more: copd logs ")
