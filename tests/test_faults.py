"""A local run that loses a rank, then its disk: it starts again by itself, says what happened, loses nothing.

The same faults on a cluster, and more of them: ``test_slurm.py``.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from copd_megatron.checkpoint.compare import compare_runs
from copd_megatron.checkpoint.manifest import complete_checkpoints
from tests.checkpoint_runs import BRANCHES, NUM_STEPS, log_of, prepare, train, training, write_config


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
        [sys.executable, "-m", "copd_megatron.local_launch", str(tmp_path), "--standalone", str(rank)],
        env=os.environ | {"COPD_MAX_RESTARTS": "1", "STARTS": str(tmp_path / "starts")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert launch.returncode == status, launch.stderr
    assert (tmp_path / "starts").read_text() == "x" * starts
    assert ("copd: ended: rank 0 with 9; restart 1 of 1" in launch.stderr) == (starts == 2)


# --- whole runs: minutes on two cores -----------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "none", str(folder)]).returncode:
        pytest.skip("this container may not mount")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _steps(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _rank(run_dir: Path, rank: int) -> int:
    """Process id of a rank of a run."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().split(b"\0")
            environment = (process / "environ").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it has ended meanwhile, or is none of ours
        if f"run.dir={run_dir}".encode() in command and f"RANK={rank}".encode() in environment:
            return int(process.name)
    raise AssertionError(f"{run_dir} has no rank {rank}")


def _fill(folder: Path) -> Path:
    """A file that takes all the room there is."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError:
            return filler


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_killed_rank_and_a_full_disk_lose_nothing(tmp_path: Path, disk: Path) -> None:
    prepare(tmp_path)
    config = write_config(
        tmp_path, {name: {} for name in BRANCHES}, checkpoint={"save_period": 1, "keep_last": 2}
    )
    undisturbed, run_dir = tmp_path / "undisturbed", tmp_path / "run"
    (disk / "run").mkdir()
    run_dir.symlink_to(disk / "run")  # the log beside it is elsewhere
    assert train(config, undisturbed) == 0, log_of(undisturbed).read_text()[-4000:]

    with training(config, run_dir, ["run.max_restarts=1"]) as process:

        def until(condition: Callable[[], bool]) -> None:
            deadline = time.monotonic() + 240
            while not condition():
                said = log_of(run_dir).read_text()[-4000:]
                assert process.poll() is None and time.monotonic() < deadline, said
                time.sleep(0.05)

        until(lambda: len(complete_checkpoints(run_dir)) >= 2)
        os.kill(_rank(run_dir, 1), signal.SIGKILL)
        until(lambda: "resumed from" in log_of(run_dir).read_text())
        filler = _fill(disk)
        assert process.wait(300) != 0
    said = log_of(run_dir).read_text()
    assert "restart 1 of 1" in said and "rank 1 with -9" in said
    assert "No space left on device" in said
    newest = next(iter(complete_checkpoints(run_dir)))
    assert 1 <= newest < NUM_STEPS

    assert train(config, run_dir) == 2, "there is no room for the run"
    assert "free some, name another run.dir" in log_of(run_dir).read_text()
    filler.unlink()
    assert train(config, run_dir) == 0, log_of(run_dir).read_text()[-4000:]
    assert f"step_{newest:06d}, {newest} of {NUM_STEPS} steps done" in log_of(run_dir).read_text()
    assert compare_runs(undisturbed, run_dir) == []
