"""Jobs as forked processes: what a rank imports is imported once, by the process that all of them come from.

These imports cost a rank about ten seconds of CPU, often more than its training at this scale. What a job
computes does not depend on how it was started.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

from copd_megatron.topology.loopback import only_this_machine, rank_environment

_MODULES = (
    "copd_megatron.policy.actor",
    "copd_megatron.checkpoint.actor_state",
    "copd_megatron.train",
    "copd_megatron.evaluation.models",
    "copd_megatron.cli.main",
    "vllm.entrypoints.llm",
)
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "CUDA_VISIBLE_DEVICES": "",
}
"""Of every job: one thread a process, on the CPU."""
_PR_SET_PDEATHSIG = 1
_STORE_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Program:
    """A module's ``main(arguments)`` on one or several ranks."""

    module: str
    arguments: tuple[str, ...]
    ranks: int | None = None
    """None: one process that is no rank. Otherwise each process has the variables that torchrun sets."""


def warm_up() -> None:
    """Imports what jobs need. No thread may be started here: a fork leaves threads behind."""
    os.environ.update(ENVIRONMENT)
    for module in _MODULES:
        importlib.import_module(module)


def fork(program: Program, log: Path) -> int:
    """Starts a program in a session of its own; its output goes to ``log``. Returns the process id.

    The process ends when this one does. Its exit status is 0 if all of its ranks ended with 0.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()
        _end_with(parent)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        # this process's own may lead elsewhere, and hold what the parent has not written yet
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        status = _lead(program)
    except BaseException:
        traceback.print_exc()
    _leave(status)


def _lead(program: Program) -> int:
    if program.ranks is None:
        return _run(program)
    from copd_megatron.topology.store import serve_store

    os.environ |= only_this_machine()
    store = serve_store("127.0.0.1", 0, timedelta(seconds=_STORE_SECONDS))
    leader = os.getpid()
    ranks: list[int] = []
    for rank in range(program.ranks):
        pid = os.fork()
        if not pid:
            status = 1
            try:
                _end_with(leader)
                os.environ.update(rank_environment(rank, program.ranks, store.port))
                status = _run(program)
            except BaseException:
                traceback.print_exc()
            _leave(status)
        ranks.append(pid)
    return _wait(ranks)


def _wait(ranks: Sequence[int]) -> int:
    """The first status that is not 0; the ranks that are left then are ended."""
    running = set(ranks)
    first = 0
    while running:
        pid, status = os.wait()
        if pid not in running:
            continue
        running.discard(pid)
        code = os.waitstatus_to_exitcode(status)
        if code != 0 and first == 0:
            first = 1
            print(f"a rank ended with {code}; the others are ended", flush=True)
            for other in running:
                os.kill(other, signal.SIGKILL)
    return first


def _run(program: Program) -> int:
    sys.argv = [program.module, *program.arguments]
    status: int = importlib.import_module(program.module).main(list(program.arguments))
    return status


def _leave(status: int) -> NoReturn:
    """Ends this process without what the parent has registered for its own end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _end_with(parent: int) -> None:
    """The kernel kills this process when its parent dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
