"""How a run on this machine ends: the exit status, and the last thing that a person sees."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from copd_megatron.errors import EXIT_HOPELESS, ConfigError
from copd_megatron.launch.preflight import clear_run

ROOT = Path(__file__).resolve().parents[1]


def _launch(run_dir: Path, how: str) -> subprocess.CompletedProcess[str]:
    launcher = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    environment = {name: value for name, value in os.environ.items() if name not in launcher}
    return subprocess.run(
        [
            *(sys.executable, "-m", "copd_megatron.launch.local", str(run_dir)),
            *("--nnodes=1", "--nproc-per-node=2", "--rdzv-backend=copd-loopback", "--rdzv-id=x"),
            *("--signals-to-handle=SIGTERM,SIGINT", "-m", "tests.support.failing_rank", str(run_dir), how),
        ],
        env={**environment, "COPD_MAX_RESTARTS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.mark.parametrize(
    ("how", "status", "starts", "last"),
    [
        (
            "config",
            EXIT_HOPELESS,
            1,
            "rank 1 ended the run: copd_megatron.errors.ConfigError: run.seed: no good",
        ),
        ("bug", 1, 2, "rank 1 ended the run: KeyError: 'a bug'"),
        ("interrupt", 130, 1, "ended by SIGINT; nothing is saved yet"),
    ],
)
def test_the_last_lines_say_why_and_where_to_read_on(
    tmp_path: Path, how: str, status: int, starts: int, last: str
) -> None:
    """A failure that starting again cannot mend is not started again."""
    done = _launch(tmp_path, how)
    assert done.returncode == status, done.stderr
    assert len(list(tmp_path.glob("started_1_*"))) == starts
    lines = done.stderr.strip().splitlines()
    if how == "interrupt":
        assert "Traceback" not in done.stderr
        assert lines[-1] == f"copd: {last}"
    else:
        assert lines[-2:] == [f"copd: {last}", f"copd: more: copd logs {tmp_path} --level ERROR"]


def test_overwriting_deletes_the_old_run_and_nothing_else(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints/step_000001").mkdir(parents=True)
    (run / "metrics.jsonl").write_text("{}\n")
    (run / "notes.txt").write_text("mine")
    clear_run(run)
    assert [path.name for path in run.iterdir()] == ["notes.txt"]
    clear_run(run)  # there is nothing to delete


def test_checkpoints_behind_a_link_are_left_alone_and_not_continued(tmp_path: Path) -> None:
    kept = tmp_path / "elsewhere"
    (kept / "step_000001").mkdir(parents=True)
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to(kept)
    with pytest.raises(ConfigError, match=r"run\.overwrite: .*checkpoints is a link to .*elsewhere"):
        clear_run(run)
    assert (kept / "step_000001").is_dir()


def test_what_cannot_be_deleted_is_named(tmp_path: Path) -> None:
    (tmp_path / "run/metrics.jsonl").mkdir(parents=True)  # a folder is no file to unlink, for root either
    with pytest.raises(ConfigError, match=r"run\.overwrite: .*metrics\.jsonl cannot be deleted"):
        clear_run(tmp_path / "run")
