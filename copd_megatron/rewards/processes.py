"""The trainer's side of the grading processes: the fork server, and the workers that it makes.

Nothing here waits without a limit. The fork server gets one short line at a time and has a deadline for its
answer; a worker's socket never blocks, however large the request.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

START_SECONDS = 120.0
"""For starting the fork server and importing a verifier; slow only on a cold shared file system."""
_CALL_SECONDS = 30.0
"""For forking or ending a process, which takes milliseconds."""
_CLOSE_SECONDS = 5.0
MAX_ANSWER_BYTES = 1 << 16

_KEPT_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "PYTHONHOME", "LANG", "LC_ALL", "TZ", "COPD_UNSANDBOXED_CODE")
"""What Python itself may need to start, and the switch of ``sandbox/``. Everything else, tokens and
addresses above all, stays behind."""


class ServerGoneError(RuntimeError):
    """The fork server has died, or does not answer."""


class ForkServer:
    """One process that has the verifiers imported and forks workers. Started when first needed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._root: Path | None = None
        self._owner = os.getpid()
        self._loaded: set[str] = set()

    def load(self, target: str) -> bool:
        """Have a verifier imported; False if it was already, so that workers have it, too.

        Raises RuntimeError if it cannot be imported, ServerGoneError if the server dies over it.
        """
        if self._process is None:
            self._start()
        if target in self._loaded:
            return False
        try:
            answer, _ = self._call({"load": target}, START_SECONDS)
        except ServerGoneError as error:
            raise self._not_loadable(target, f"{error}{self._last_words()}") from error
        if "error" in answer:
            raise self._not_loadable(target, answer["error"])
        self._loaded.add(target)
        return True

    def fork(self) -> Worker:
        """A new worker that has all loaded verifiers. Raises ServerGoneError."""
        answer, descriptors = self._call({"fork": True}, _CALL_SECONDS)
        return Worker(answer["pid"], socket.socket(fileno=descriptors[0]))

    def end(self, worker: Worker) -> str:
        """Kill a worker and all that it started. Returns how it ended. Raises ServerGoneError."""
        worker.close()
        answer, _ = self._call({"end": worker.pid}, _CALL_SECONDS)
        return _how_it_ended(answer["status"])

    def close(self) -> None:
        """End the server and its workers, and remove the scratch folder. It may be started again."""
        if self._process is None or self._channel is None or os.getpid() != self._owner:
            return
        self._channel.close()  # what makes the server clean up and leave
        try:
            self._process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._root is not None
        shutil.rmtree(self._root, ignore_errors=True)
        self._process = self._channel = self._root = None
        self._loaded.clear()

    def _start(self) -> None:
        self._owner = os.getpid()
        self._root = Path(tempfile.mkdtemp(prefix="copd-grading-"))
        ours, theirs = socket.socketpair()
        with theirs, (self._root / "stderr").open("wb") as stderr:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-W", "ignore", "-m", "copd_megatron.rewards.fork_server"),
                    *(str(theirs.fileno()), str(os.getpid()), str(self._root)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                pass_fds=(theirs.fileno(),),
                env=_environment(self._root),
                cwd=self._root,
                start_new_session=True,  # Ctrl-C is for the trainer, which closes the server in good order
            )
        self._channel = ours

    def _call(self, request: dict[str, Any], limit_seconds: float) -> tuple[dict[str, Any], list[int]]:
        assert self._channel is not None
        deadline = time.monotonic() + limit_seconds
        received, descriptors = bytearray(), list[int]()
        try:
            self._channel.settimeout(limit_seconds)
            self._channel.sendall(json.dumps(request).encode("ascii") + b"\n")
            while not received.endswith(b"\n"):
                self._channel.settimeout(max(deadline - time.monotonic(), 0.001))
                part, fds, _, _ = socket.recv_fds(self._channel, 1 << 12, 1, socket.MSG_CMSG_CLOEXEC)
                descriptors += fds
                if not part:
                    raise ServerGoneError(self._end_of_server())
                received += part
            return json.loads(received), descriptors
        except TimeoutError as error:
            raise ServerGoneError(f"no answer within {limit_seconds:g} s") from error
        except OSError as error:
            raise ServerGoneError(self._end_of_server()) from error
        except ValueError as error:
            raise ServerGoneError(f"an answer that is none: {bytes(received[:60])!r}") from error

    def _end_of_server(self) -> str:
        assert self._process is not None
        try:
            code = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            return "the process that forks the workers has closed its socket"
        how = _how_it_ended(-code if code < 0 else code << 8)
        return f"the process that forks the workers has ended ({how})"

    def _last_words(self) -> str:
        assert self._root is not None
        lines = (self._root / "stderr").read_text(errors="replace").strip().splitlines()
        return f"; its last line: {lines[-1][:300]}" if lines else ""

    def _not_loadable(self, target: str, why: str) -> RuntimeError:
        self.close()
        return RuntimeError(
            f"verifier {target} cannot be loaded in a grading process ({why}). Check that its module imports "
            f"by itself within {START_SECONDS:g} s: {sys.executable} -c 'import {target.partition(':')[0]}'."
        )


class Worker:
    """One forked process: its socket, and the request that it is working on."""

    def __init__(self, pid: int, channel: socket.socket) -> None:
        self.pid = pid
        self._channel = channel
        self._channel.setblocking(False)
        self._outgoing = memoryview(b"")
        self._incoming = bytearray()

    def fileno(self) -> int:
        """Descriptor to wait for."""
        return self._channel.fileno()

    def is_quiet(self) -> bool:
        """Whether the process lives and has nothing to say, as it should between two requests."""
        try:
            self._channel.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    @property
    def is_sending(self) -> bool:
        """Whether part of the request has yet to be written."""
        return bool(self._outgoing)

    def send(self, line: bytes) -> None:
        """Begin to send a request; ``advance`` goes on with it."""
        self._incoming.clear()
        self._outgoing = memoryview(line)

    def advance(self) -> bytes | None:
        """Write and read what is possible now; the answer's line once it is whole.

        Raises EOFError if the process has closed its socket or answers at greater length than it may.
        """
        try:
            while self._outgoing:
                self._outgoing = self._outgoing[self._channel.send(self._outgoing) :]
        except BlockingIOError:
            pass  # its socket is full; it will read when it comes to it
        except OSError as error:
            raise EOFError(str(error)) from error
        try:
            part = self._channel.recv(MAX_ANSWER_BYTES)
        except BlockingIOError:
            return None
        except OSError as error:
            raise EOFError(str(error)) from error
        self._incoming += part
        if not part or len(self._incoming) > MAX_ANSWER_BYTES:
            raise EOFError("closed its socket" if not part else "too long an answer")
        return bytes(self._incoming) if self._incoming.endswith(b"\n") else None

    def seconds_in_queue(self) -> float:
        """How long the process has been ready to run without a processor; 0 where the kernel keeps no
        count."""
        try:
            return int(Path(f"/proc/{self.pid}/schedstat").read_text().split()[1]) / 1e9
        except (OSError, IndexError, ValueError):
            return 0.0

    def close(self) -> None:
        """Close the socket. Only the fork server can end the process."""
        self._channel.close()


def _environment(scratch: Path) -> dict[str, str]:
    kept = {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ}
    return kept | {
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        "PYTHONHASHSEED": "0",  # nothing may depend on the order of sets: same response, same grade
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "HOME": str(scratch),
        "TMPDIR": str(scratch),
    }


def _how_it_ended(status: int | None) -> str:
    if status is None:
        return "the kernel does not let go of it"
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        hint = ", as by the kernel when memory runs out" if number == signal.SIGKILL else ""
        return f"killed by signal {number} ({signal.strsignal(number)}){hint}"
    return f"exit status {os.WEXITSTATUS(status)}"
