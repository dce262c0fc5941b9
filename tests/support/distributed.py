"""Run a function on several real ranks: processes with a launcher's environment, as torchrun would make them.

``run_distributed(fn, world_size)`` returns the ranks' results or raises with the traceback of the rank that
failed first; ``launch_distributed`` returns every rank's outcome, for tests in which ranks are meant to die.

Ranks are forked from a server process that has imported torch once (no rank pays the seconds that takes);
``fresh_interpreter=True`` starts each from scratch, for code that must set things up before torch is
imported. Functions and arguments travel by pickle, so a function must be importable: a module-level ``def``
of a test.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess, SpawnProcess
from pathlib import Path
from typing import Any

_THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
_GRACE_SECONDS = 15.0
"""What the other ranks get to end by themselves after one has failed."""

_forkserver = multiprocessing.get_context("forkserver")
_forkserver.set_forkserver_preload(["torch", "torch.distributed"])
_spawn = multiprocessing.get_context("spawn")


@dataclass(frozen=True, kw_only=True)
class RankOutcome:
    """How one rank ended."""

    rank: int
    exit_code: int | None
    """Negative: killed by that signal. None: still running when the time was up (then killed)."""
    result: Any
    """What the function returned; None if it did not return."""
    error: str | None
    """Traceback, if the function raised."""
    output: str
    """stdout and stderr, in order."""
    seconds: float
    """From launch to exit."""


class DistributedTestError(AssertionError):
    """A rank raised, died, or did not end in time."""


def run_distributed(
    fn: Callable[..., Any],
    world_size: int,
    *,
    env: Mapping[str, str] | None = None,
    timeout: float = 120,
    args: Sequence[Any] = (),
    agent_store: bool = True,
    fresh_interpreter: bool = False,
) -> list[Any]:
    """``fn(*args)`` on ``world_size`` ranks; their results by rank.

    RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are set as torchrun sets them, plus ``env``.

    Raises:
        DistributedTestError: with the traceback and the output of the rank that failed first, and the
            outputs' tails of the others.
    """
    outcomes = launch_distributed(
        fn, world_size, env=env, timeout=timeout, args=args, agent_store=agent_store,
        fresh_interpreter=fresh_interpreter, stop_on_failure=True,
    )  # fmt: skip
    failed = [o for o in outcomes if o.error is not None or o.exit_code != 0]
    if failed:
        # A rank that was still running had been waiting for one that had failed.
        failed.sort(key=lambda o: (o.exit_code is None, o.seconds))
        parts = [
            f"rank {o.rank}: exit code "
            f"{'none (killed, out of time)' if o.exit_code is None else o.exit_code} after {o.seconds:.1f} "
            f"s\n{o.error or ''}\noutput:\n{o.output[-6000 if i == 0 else -1500 :]}"
            for i, o in enumerate(failed)
        ]
        raise DistributedTestError(f"{len(failed)} of {world_size} ranks failed\n" + "\n".join(parts))
    return [o.result for o in outcomes]


def launch_distributed(
    fn: Callable[..., Any],
    world_size: int,
    *,
    env: Mapping[str, str] | None = None,
    timeout: float = 120,
    args: Sequence[Any] = (),
    agent_store: bool = True,
    fresh_interpreter: bool = False,
    stop_on_failure: bool = False,
) -> list[RankOutcome]:
    """As ``run_distributed``, but never raises for a rank: every rank's outcome.

    Args:
        agent_store: the caller hosts the store, as torchrun's agent does; else rank 0 must.
        stop_on_failure: once a rank fails, the others get a few seconds and are then killed.
    """
    context = _spawn if fresh_interpreter else _forkserver
    with tempfile.TemporaryDirectory(prefix="copd_ranks_") as name, _store_port(agent_store) as port:
        folder = Path(name)
        environments = [
            {
                **_THREADS,
                "RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "TORCHELASTIC_USE_AGENT_STORE": str(agent_store),
                "TORCHELASTIC_RESTART_COUNT": "0",
                **(env or {}),
            }
            for rank in range(world_size)
        ]
        started = time.monotonic()
        with _environment(_THREADS):
            processes = [
                context.Process(
                    target=_rank_main,
                    args=(pickle.dumps((fn, tuple(args))), environments[rank], folder / str(rank)),
                )
                for rank in range(world_size)
            ]
            for process in processes:
                process.start()
        try:
            ended = _wait(processes, started + timeout, stop_on_failure)
        finally:
            for process in processes:
                _kill(process)
        now = time.monotonic()
        return [
            _outcome(
                rank,
                process.exitcode if rank in ended else None,
                ended.get(rank, now) - started,
                folder / str(rank),
            )
            for rank, process in enumerate(processes)
        ]


def _wait(
    processes: Sequence[ForkServerProcess | SpawnProcess], deadline: float, stop: bool
) -> dict[int, float]:
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
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
                stop = False
    return ended


def _kill(process: ForkServerProcess | SpawnProcess) -> None:
    """Kill a rank and what it started (it leads a process group of its own)."""
    if process.pid is None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def _outcome(rank: int, exit_code: int | None, seconds: float, stem: Path) -> RankOutcome:
    result, error = None, None
    written = stem.with_suffix(".result")
    if written.exists():
        result, error = pickle.loads(written.read_bytes())
    log = stem.with_suffix(".log")
    output = log.read_text(errors="replace") if log.exists() else ""
    if exit_code == 0 and not written.exists():
        error = "the process ended without returning from the function"
    return RankOutcome(
        rank=rank, exit_code=exit_code, result=result, error=error, output=output, seconds=seconds
    )


def _rank_main(call: bytes, environment: Mapping[str, str], stem: Path) -> None:
    os.setpgid(0, 0)
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


@contextlib.contextmanager
def _store_port(agent_store: bool) -> Iterator[int]:
    """Port of a store hosted here for the block, or a free port for rank 0 to host it on."""
    if agent_store:
        import torch.distributed as dist

        store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        yield store.port
    else:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        yield port


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables for the block: a server or interpreter started in it reads them as it imports torch."""
    saved = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
