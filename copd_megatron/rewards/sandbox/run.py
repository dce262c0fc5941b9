"""Runs one program, within its limits, and returns what it wrote."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from copd_megatron.rewards.sandbox import bubblewrap
from copd_megatron.rewards.sandbox.limits import Limits
from copd_megatron.rewards.sandbox.memory import Bound, bounded

_CHUNK = 65536
_STDERR_BYTES = 2000
_FIRST_PROCESS = re.compile(rb'\s*\{\s*"child-pid"\s*:\s*(\d+)')
_GONE_SECONDS = 5.0
"""How long killed processes may take to be gone."""
_KILLED_BY_CPU = (128 + signal.SIGXCPU, 128 + signal.SIGKILL)


class Ended(Enum):
    """How a run ended."""

    ok = "ok"
    """Exit status 0."""
    error = "error"
    """Another exit status: an exception, a signal, too much memory for one process."""
    time = "time"
    """CPU or wall-clock time was up."""
    memory = "memory"
    """All processes together took more memory than they may."""
    output = "output"
    """Wrote more than it may."""


@dataclass(frozen=True)
class Result:
    """How a program ended, and what it wrote to stdout: at most ``Limits.output_bytes``."""

    ended: Ended
    output: bytes


def run(
    program: bytes,
    *,
    stdin: bytes = b"",
    mode: str = "program",
    limits: Limits | None = None,
    mounts: Sequence[str] = (),
) -> Result:
    """Runs a program in a sandbox of its own; when this returns, nothing of it is left.

    Args:
        program: Python source.
        stdin: its input, or the request of mode ``value``.
        mode: ``program`` (a script), ``value`` or ``command`` (see ``inside.py``).
        limits: what it may use; by default, ``Limits()``.
        mounts: files and folders of the host that it may read.

    Raises SandboxError: the sandbox could not be set up. ``require`` says the remedy.
    """
    limits = limits or Limits()
    with contextlib.ExitStack() as stack:
        files = (bubblewrap.INSIDE, program, bubblewrap.CALLS or b"", stdin)
        inside, source, calls, given = (stack.enter_context(_sealed(data)) for data in files)
        errors = stack.enter_context(tempfile.TemporaryFile())
        scratch = stack.enter_context(tempfile.TemporaryDirectory()) if bubblewrap.unsandboxed() else None
        status, status_end = os.pipe()
        stack.callback(os.close, status)
        inherited = bubblewrap.Descriptors(inside=inside, program=source, calls=calls, status=status_end)
        command = bubblewrap.command(mode, limits, inherited, mounts)
        bound = stack.enter_context(_bounded(limits))
        deadline = time.monotonic() + limits.wall_seconds
        process = _start(command, given, errors.fileno(), (inside, source, calls, status_end), scratch, bound)
        assert process.stdout is not None
        stack.enter_context(process.stdout)
        report = bytearray()
        try:
            ended, output = _follow(process, status, report, limits, deadline, bound)
        finally:
            _kill(process, report)
        if bound.is_exceeded(None):
            ended = Ended.memory
        if ended is None and scratch is None and b'"exit-code"' not in report:
            errors.seek(0)
            text = errors.read(_STDERR_BYTES).decode("utf-8", "replace").strip()
            raise bubblewrap.SandboxError(f"bwrap failed: {text.partition(chr(10))[0] or process.returncode}")
        return Result(ended or _how(process.returncode), output)


@contextlib.contextmanager
def _bounded(limits: Limits) -> Iterator[Bound]:
    """``memory.bounded``. Raises SandboxError."""
    with contextlib.ExitStack() as stack:
        try:
            bound = stack.enter_context(bounded(limits.total_memory_bytes))
        except OSError as error:
            raise bubblewrap.SandboxError(f"no control group can be made: {error}") from error
        yield bound


def _how(status: int) -> Ended:
    if status == 0:
        return Ended.ok
    return (
        Ended.time if status in _KILLED_BY_CPU or -status in (signal.SIGXCPU, signal.SIGKILL) else Ended.error
    )


@contextlib.contextmanager
def _sealed(data: bytes) -> Iterator[int]:
    """A file in memory that nobody can change, as a descriptor at its beginning."""
    descriptor = os.memfd_create("sandbox", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(data)
        os.lseek(descriptor, 0, os.SEEK_SET)
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
        yield descriptor
    finally:
        os.close(descriptor)


def _start(
    command: list[str],
    stdin: int,
    stderr: int,
    inherited: tuple[int, ...],
    scratch: str | None,
    bound: Bound,
) -> subprocess.Popen[bytes]:
    """Starts the command; closes the last inherited descriptor, the status pipe's writing end, here."""
    try:
        return subprocess.Popen(
            command,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=stderr if scratch is None else subprocess.DEVNULL,
            env={"PYTHONHASHSEED": "0"},
            cwd=scratch or "/",
            pass_fds=inherited,
            start_new_session=True,
            preexec_fn=bound.join,
            **(bubblewrap.identity() if scratch is None else {}),
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise bubblewrap.SandboxError(f"{command[0]} cannot be started: {error}") from error
    finally:
        os.close(inherited[-1])


def _follow(
    process: subprocess.Popen[bytes],
    status: int,
    report: bytearray,
    limits: Limits,
    deadline: float,
    bound: Bound,
) -> tuple[Ended | None, bytes]:
    """Reads until both ends are closed and the process has ended. It is not reaped here, so that its number
    still names it when it is killed with its group.

    Returns the limit that ended it, if one did, and its output. ``report`` gets what bubblewrap reports.
    """
    assert process.stdout is not None
    output = bytearray()
    end = os.pidfd_open(process.pid)
    next_look = time.monotonic() + bound.period
    with os.fdopen(end, "rb", buffering=0), selectors.DefaultSelector() as ready:
        ready.register(process.stdout, selectors.EVENT_READ, output)
        ready.register(status, selectors.EVENT_READ, report)
        ready.register(end, selectors.EVENT_READ)
        while ready.get_map():
            events = ready.select(max(0.0, min(deadline, next_look) - time.monotonic()))
            now = time.monotonic()
            if now >= deadline and not events:
                return Ended.time, bytes(output)
            if now >= next_look:
                if bound.is_exceeded(process.pid):
                    return Ended.memory, bytes(output)
                next_look = now + bound.period
            for key, _ in events:
                data = os.read(key.fd, _CHUNK) if key.fd != end else b""
                if data:
                    key.data.extend(data)
                else:
                    ready.unregister(key.fileobj)
            if len(output) > limits.output_bytes:
                return Ended.output, bytes(output[: limits.output_bytes])
    return None, bytes(output)


def _kill(process: subprocess.Popen[bytes], report: bytearray) -> None:
    """Ends the process with its group, and the first process in the sandbox, with which the kernel ends all
    others there. That takes a moment where there are many; the last of them closes the pipe.

    Bubblewrap reports the first process before it lets it start, so that no program can name another one."""
    first = _FIRST_PROCESS.match(report)
    with contextlib.suppress(ProcessLookupError):
        if first is not None and _parent(int(first.group(1))) == process.pid:
            os.kill(int(first.group(1)), signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    deadline = time.monotonic() + _GONE_SECONDS
    while (remaining := deadline - time.monotonic()) > 0:
        ready, _, _ = select.select([process.stdout], [], [], remaining)
        if ready and not os.read(process.stdout.fileno(), _CHUNK):
            return


def _parent(pid: int) -> int | None:
    """The parent of a process, None where it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None
