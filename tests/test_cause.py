"""Which of many errors is the cause of a run's end."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from copd_megatron.launch import cause
from copd_megatron.launch.cause import memory_kills, why_it_ended
from copd_megatron.topology.who_waits import JOB_ENDS

START = datetime(2026, 1, 31, 12, 0, 0)
_COLLECTIVE = (
    "copd_megatron.metrics.rank_log: this rank ends by CollectiveError: alpha rank 0 (global rank 0): "
    "operation 'barrier close' failed after 3.0 s: Connection closed by peer"
)
_BUG = "copd_megatron.metrics.rank_log: this rank ends by KeyError: 'a bug'"
_STUCK = (
    "copd_megatron.topology.job_end: watch: beta rank 0 (global rank 1) in operation 'rollout.generate' "
    "without progress for 75 s (limit 75 s)"
)


def _log(folder: Path, rank: int, *lines: str, second: int = 30) -> None:
    (folder / "logs").mkdir(exist_ok=True)
    place = f"[{'ab'[rank]} 0/1, rank {rank}]"
    text = "".join(f"2026-01-31 12:00:{second:02d}.000000 CRITICAL {place} {line}\n" for line in lines)
    with (folder / f"logs/rank_{rank:05d}.log").open("a") as file:
        file.write(text)


def test_the_first_error_counts_not_what_it_brought_about(tmp_path: Path) -> None:
    _log(tmp_path, 0, _COLLECTIVE, second=20)
    _log(tmp_path, 1, _BUG, "Traceback (most recent call last):", "KeyError: 'a bug'", second=21)
    assert why_it_ended(tmp_path, {0: 1, 1: 1}, since=START) == "b rank 0 (global rank 1): KeyError: 'a bug'"


def test_a_killed_rank_is_the_cause_of_the_others_errors(tmp_path: Path) -> None:
    _log(tmp_path, 0, _COLLECTIVE)
    told = why_it_ended(tmp_path, {0: 1, 1: -9}, since=START)
    assert told == "global rank 1 was killed by SIGKILL, as by the kernel when memory runs out (see dmesg)"
    assert why_it_ended(tmp_path, {1: -11}, since=START) == "global rank 1 was killed by SIGSEGV"


def test_a_kill_for_memory_is_told_apart_by_the_kernels_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(before: int | None, now: int | None) -> str:
        monkeypatch.setattr(cause, "memory_kills", lambda: now)
        return why_it_ended(tmp_path, {1: -9}, since=START, kills_before=before)

    assert told(4, 5).startswith(
        "global rank 1 was killed by SIGKILL, by the kernel for want of memory: give the job more memory"
    )
    for before, now in ((4, 4), (None, 5), (4, None)):
        assert told(before, now).endswith(", as by the kernel when memory runs out (see dmesg)")
    (tmp_path / "vmstat").write_text("nr_free_pages 7\noom_kill 12\n")
    assert memory_kills(tmp_path / "vmstat") == 12
    assert memory_kills(tmp_path / "nothing") is None


def test_full_shared_memory_is_named(tmp_path: Path) -> None:
    """A mapped page that has no room any more is SIGBUS; NCCL's message begins with something else."""
    told = why_it_ended(tmp_path, {0: -7, 1: -15}, since=START)
    assert told.startswith("global rank 0 was killed by SIGBUS, as when /dev/shm is full: remove what")
    _log(
        tmp_path,
        1,
        _COLLECTIVE,
        "Traceback (most recent call last):",
        "torch.distributed.DistBackendError: NCCL error in: x.cpp, unhandled system error",
        "Error while creating shared memory segment /dev/shm/nccl-X, error: No space left on device (28)",
    )
    told = why_it_ended(tmp_path, {0: 1, 1: 1}, since=START)
    assert told.startswith("b rank 0 (global rank 1): /dev/shm is full: remove what killed runs left there")
    assert "--shm-size" in told and "/dev/shm/nccl-X" in told


def test_ranks_that_the_launcher_ended_are_not_the_cause(tmp_path: Path) -> None:
    told = why_it_ended(tmp_path, {0: -15, 1: -11, 2: -15}, since=START)
    assert told == "global rank 1 was killed by SIGSEGV"
    assert why_it_ended(tmp_path, {0: -15}, since=START) == "global rank 0 was killed by SIGTERM"


def test_a_stuck_rank_is_named(tmp_path: Path) -> None:
    _log(tmp_path, 1, _STUCK, "waiting for: nobody; no other rank takes part in this")
    _log(tmp_path, 0, _COLLECTIVE, second=20)
    told = why_it_ended(tmp_path, {0: 86, 1: 86}, since=START)
    assert told.startswith(
        "beta rank 0 (global rank 1) in operation 'rollout.generate' without progress for 75 s"
    )


def test_a_rank_that_could_not_log_is_told_by_the_others(tmp_path: Path) -> None:
    """Its disk is full."""
    reason = "a rank 0 (global rank 0): RunStorageError: the metrics of step 3 cannot be written"
    _log(tmp_path, 1, f"copd_megatron.topology.job_end: {JOB_ENDS}{reason}")
    assert why_it_ended(tmp_path, {0: 78, 1: 78}, since=START) == reason


def test_what_an_earlier_start_logged_is_not_the_cause(tmp_path: Path) -> None:
    _log(tmp_path, 1, _BUG)
    later = START.replace(minute=1)
    assert why_it_ended(tmp_path, {1: 3}, since=later) == "global rank 1 exited with status 3"


@pytest.mark.parametrize("exits", [{0: 1}, {0: 1, 1: 2}])
def test_without_logs_the_statuses_are_all_there_is(tmp_path: Path, exits: dict[int, int]) -> None:
    told = why_it_ended(tmp_path, exits, since=START)
    assert told == ", ".join(f"global rank {rank} exited with status {code}" for rank, code in exits.items())
