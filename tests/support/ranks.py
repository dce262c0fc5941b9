"""The processes of one launch: started, waited for, ended; what each leaves in the launch's folder.

A rank writes its output to ``<rank>.log`` and what its function returned, or the traceback of what it
raised, to ``<rank>.result``.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

GRACE_SECONDS = 15.0
"""How long the other ranks may take to end by themselves after one has failed."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What the ranks of one launch are to do. It travels to the process that starts them."""

    call: bytes
    """Pickled (function, arguments)."""
    environments: Sequence[Mapping[str, str]]
    """Variables of each rank, by rank."""
    folder: Path
    timeout: float
    """Seconds until ranks that are still running are killed."""
    stop_on_failure: bool
    """Once a rank fails, the others get ``GRACE_SECONDS`` and are then killed."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a rank's process ended."""

    exit_code: int | None
    """Negative: killed by that signal. None: still running when the time was up, then killed."""
    seconds: float
    """From launch to exit."""


def run_ranks(context: BaseContext, launch: Launch) -> list[Ended]:
    """Starts the ranks and returns once all have ended."""
    started = time.monotonic()
    processes: list[BaseProcess] = [
        context.Process(target=_rank_main, args=(launch.call, environment, launch.folder / str(rank)))  # type: ignore[attr-defined]
        for rank, environment in enumerate(launch.environments)
    ]
    try:
        for process in processes:
            process.start()
        ended = _wait(processes, started + launch.timeout, launch.stop_on_failure)
    finally:
        for process in processes:
            _kill(process)
    now = time.monotonic()
    return [
        Ended(exit_code=process.exitcode if rank in ended else None, seconds=ended.get(rank, now) - started)
        for rank, process in enumerate(processes)
    ]


def _wait(processes: Sequence[BaseProcess], deadline: float, stop: bool) -> dict[int, float]:
    """Monotonic end time of each rank that ended by itself before the deadline."""
    ended: dict[int, float] = {}
    while len(ended) < len(processes) and (remaining := deadline - time.monotonic()) > 0:
        running = {p.sentinel: rank for rank, p in enumerate(processes) if rank not in ended}
        for sentinel in wait(list(running), timeout=remaining):
            assert isinstance(sentinel, int)
            rank = running[sentinel]
            processes[rank].join()
            ended[rank] = time.monotonic()
            if stop and processes[rank].exitcode != 0:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
                stop = False
    return ended


def _kill(process: BaseProcess) -> None:
    """Kills a rank and what it started: it leads a process group of its own."""
    if process.pid is None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def _rank_main(call: bytes, environment: Mapping[str, str], stem: Path) -> None:
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.update(environment)
    log = os.open(stem.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        fn, args = pickle.loads(call)
        outcome: tuple[Any, str | None] = (fn(*args), None)
    except BaseException:
        outcome = (None, traceback.format_exc())
    written = stem.with_suffix(".partial")
    written.write_bytes(pickle.dumps(outcome))
    written.rename(stem.with_suffix(".result"))
    sys.stdout.flush()
    sys.stderr.flush()
    if outcome[1] is not None:
        sys.exit(1)
