"""A local run that is interrupted at any stage, meets a second one, loses its directory, or lasts long."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from copd_megatron.checkpoint.manifest import complete_checkpoints
from copd_megatron.checkpoint.stop import EXIT_PREEMPTED
from copd_megatron.errors import EXIT_HOPELESS
from tests.support.checkpoint_runs import (
    BRANCHES,
    log_of,
    prepare,
    rank_processes,
    steps_written,
    train,
    training,
    until,
    write_config,
)
from tests.support.commands import copd

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

NUM_STEPS = 222
MORE_MEGABYTES = 60
"""That a rank may take between steps 60 and 219, while its allocators settle."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    prepare(root)
    return write_config(
        root,
        {name: {} for name in BRANCHES},
        schedule={"cycles": NUM_STEPS // 3},
        evaluation={"every_steps": 0},
        checkpoint={"save_period": 1, "keep_last": 2},
    )


def _has_come_to(stage: str, run_dir: Path) -> bool:
    if stage == "start":
        return any((run_dir / "logs").glob("rank_*"))
    if stage == "steps":
        return steps_written(run_dir) >= 2
    return (run_dir / "export").exists()


@pytest.fixture
def heeded() -> Iterator[None]:
    """The signals that end a run, where the tests were started ignoring them, as below nohup."""
    ignored = [s for s in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(s) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


def _left_behind(run_dir: Path, before: set[str]) -> list[str]:
    ranks = [f"rank {rank}: process {process}" for rank, process in rank_processes(run_dir).items()]
    return ranks + sorted(name for name in set(os.listdir("/dev/shm")) - before if name.startswith("copd"))


@pytest.mark.usefixtures("heeded")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("stage", ["start", "steps", "end"])
def test_a_signal_ends_a_run_in_good_order(
    config: Path, tmp_path: Path, stage: str, number: signal.Signals
) -> None:
    run_dir, before = tmp_path / "run", set(os.listdir("/dev/shm"))
    overrides = ["schedule.cycles=1"] if stage == "end" else []
    with training(config, run_dir, overrides) as process:
        until(lambda: _has_come_to(stage, run_dir), process, run_dir, 600)
        process.send_signal(number)
        status = process.wait(120)
    said = log_of(run_dir).read_text()
    saved = next(iter(complete_checkpoints(run_dir)), None)
    by_person = number is signal.SIGINT
    assert status == (EXIT_PREEMPTED if saved and not by_person else 128 + number), said[-3000:]
    assert "Traceback" not in said
    next_start = "nothing is saved yet" if saved is None else f"the same command continues from step {saved}"
    assert said.strip().splitlines()[-1] == f"copd: ended by {number.name}; {next_start}"
    assert _left_behind(run_dir, before) == []
    if stage == "end":
        assert train(config, run_dir, overrides) == 0, log_of(run_dir).read_text()[-3000:]


def test_a_second_run_in_the_same_directory_is_refused_and_disturbs_nothing(
    config: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    with training(config, run_dir) as process:
        until(lambda: steps_written(run_dir) >= 1, process, run_dir)
        second = copd("train", config, f"run.dir={run_dir}")
        assert second.returncode == 2
        assert f"run.dir: {run_dir} is in use by process" in second.stderr
        assert "Traceback" not in second.stderr
        done = steps_written(run_dir)
        until(lambda: steps_written(run_dir) > done, process, run_dir)


def test_a_run_whose_directory_is_removed_ends_with_one_sentence(config: Path, tmp_path: Path) -> None:
    run_dir, before = tmp_path / "run", set(os.listdir("/dev/shm"))
    with training(config, run_dir, ["checkpoint.save_period=0"]) as process:
        until(lambda: steps_written(run_dir) >= 2, process, run_dir)
        while run_dir.exists():  # a rank may write in the middle of it
            with contextlib.suppress(OSError):
                shutil.rmtree(run_dir)
        assert process.wait(120) == EXIT_HOPELESS, log_of(run_dir).read_text()[-3000:]
    said = log_of(run_dir).read_text()
    assert "RunStorageError" in said and "restore the folder" in said
    assert "Traceback" not in said
    assert _left_behind(run_dir, before) == []


def _megabytes(process: int) -> float:
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) / 1024


def _handles(process: int) -> tuple[int, int]:
    """Open descriptors and threads."""
    folder = Path(f"/proc/{process}")
    return len(os.listdir(folder / "fd")), len(os.listdir(folder / "task"))


def test_nothing_grows_over_two_hundred_steps(config: Path, tmp_path: Path) -> None:
    """Memory, descriptors and threads, with checkpoints, evaluations and everything that observes."""
    run_dir = tmp_path / "run"
    watching = ["checkpoint.save_period=10", "evaluation.every_steps=20", "logging.tensorboard=true"]
    watching += ["profiling.timeline=true", f"logging.prometheus.textfile={tmp_path}/copd.prom"]
    with training(config, run_dir, watching) as process:
        until(lambda: steps_written(run_dir) >= 60, process, run_dir, 600)
        ranks = rank_processes(run_dir)
        memory = {rank: _megabytes(pid) for rank, pid in ranks.items()}
        handles = {rank: _handles(pid) for rank, pid in ranks.items()}
        until(lambda: steps_written(run_dir) >= 219, process, run_dir, 900)
        for rank, pid in ranks.items():
            assert _megabytes(pid) - memory[rank] < MORE_MEGABYTES
            descriptors, threads = _handles(pid)
            assert descriptors <= handles[rank][0] + 4 and threads <= handles[rank][1] + 2
