"""Runs a function on several real ranks: processes with the environment that torchrun would give them.

``run_distributed(fn, world_size)`` returns the ranks' results, or raises with the traceback of the rank that
failed first. ``launch_distributed`` returns every rank's outcome, for tests in which ranks are meant to die.

Ranks are forked from a server process that has imported torch, or with ``megatron=True`` from one that has
imported Megatron, so that no rank pays for the import. They see no GPU unless a test asks for it.
Functions and arguments travel by pickle, so a function must be importable: a ``def`` at a module's top level.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from copd_megatron.topology.loopback import rank_environment
from tests.support.megatron_server import megatron_server
from tests.support.ranks import Ended, Launch, run_ranks

_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
_NO_GPUS = {"CUDA_VISIBLE_DEVICES": ""}
_forkserver = multiprocessing.get_context("forkserver")
_forkserver.set_forkserver_preload(["torch", "torch.distributed"])


@dataclass(frozen=True, kw_only=True)
class RankOutcome:
    """How one rank ended."""

    rank: int
    exit_code: int | None
    """Negative: killed by that signal. None: still running when the time was up, then killed."""
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


def run_distributed(fn: Callable[..., Any], world_size: int, **options: Any) -> list[Any]:
    """``fn(*args)`` on ``world_size`` ranks; their results by rank.

    Args:
        options: those of ``launch_distributed``.

    Raises:
        DistributedTestError: with the traceback and the output of the rank that failed first, and the
            outputs' tails of the others.
    """
    outcomes = launch_distributed(fn, world_size, stop_on_failure=True, **options)
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
    stop_on_failure: bool = False,
    megatron: bool = False,
    gpus: bool = False,
) -> list[RankOutcome]:
    """As ``run_distributed``, but never raises for a rank: every rank's outcome.

    RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are set as torchrun sets them, plus ``env``.

    Args:
        timeout: seconds until ranks that are still running are killed.
        agent_store: the caller hosts the store, as torchrun's agent does; else rank 0 must.
        stop_on_failure: once a rank fails, the others get a few seconds and are then killed.
        megatron: the ranks start with Megatron imported.
        gpus: the ranks see the GPUs of this machine. Not together with ``megatron``: what a process learns of
            its GPUs as it imports Megatron does not survive a fork.
    """
    assert not (megatron and gpus)
    common = _ENVIRONMENT if gpus else _ENVIRONMENT | _NO_GPUS
    with tempfile.TemporaryDirectory(prefix="copd_ranks_") as name, _store_port(agent_store) as port:
        launch = Launch(
            call=pickle.dumps((fn, tuple(args))),
            environments=[
                {**common, **rank_environment(rank, world_size, port, agent_store=agent_store), **(env or {})}
                for rank in range(world_size)
            ],
            folder=Path(name),
            timeout=timeout,
            stop_on_failure=stop_on_failure,
        )
        with _variables(common):
            ended = megatron_server().run_ranks(launch) if megatron else run_ranks(_forkserver, launch)
        return [_outcome(rank, end, launch.folder / str(rank)) for rank, end in enumerate(ended)]


def _outcome(rank: int, ended: Ended, stem: Path) -> RankOutcome:
    result, error = None, None
    written = stem.with_suffix(".result")
    if written.exists():
        result, error = pickle.loads(written.read_bytes())
    log = stem.with_suffix(".log")
    output = log.read_text(errors="replace") if log.exists() else ""
    if ended.exit_code == 0 and not written.exists():
        error = "the process ended without returning from the function"
    return RankOutcome(
        rank=rank,
        exit_code=ended.exit_code,
        result=result,
        error=error,
        output=output,
        seconds=ended.seconds,
    )


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
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    """Sets variables for the block: a server started in it reads them as it imports torch."""
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
