"""Imports verifiers once and forks grading processes that have them ready. Never sees a response.

Started by ``processes.py`` as ``python -m copd_megatron.rewards.fork_server <descriptor> <parent's pid>
<scratch folder>``: the trainer itself, which holds CUDA, Gloo and threads, must not be forked. Requests and
answers are JSON objects, one a line, over a socket:

``{"load": target}``  -> ``{}`` or ``{"error": ...}``: import a verifier, and prepare it
``{"fork": true}``    -> ``{"pid": ...}``, with the new process's socket passed along
``{"end": pid}``      -> ``{"status": ...}``: kill a process and all that it started, remove its folder

All processes end with the trainer: when its end of the socket closes, or the kernel says that it has died,
the server kills whatever it has forked, adopted orphans included, and removes the scratch folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from copd_megatron.rewards import registry
from copd_megatron.rewards.worker import prepare_process, serve

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38

_REAP_SECONDS = 5.0
"""How long a killed process may take to be gone."""


class ForkServer:
    """The processes that have been forked, and their folders."""

    def __init__(self, channel: socket.socket, root: Path) -> None:
        self._channel = channel
        self._root = root
        self._folders: dict[int, Path] = {}
        self._num_forked = 0

    def run(self) -> None:
        """Serve until the trainer's end of the socket closes."""
        try:
            with self._channel.makefile("rb") as requests:
                for line in requests:
                    request = json.loads(line)
                    if "fork" in request:
                        self._fork()
                    elif "end" in request:
                        self._answer({"status": self._end(request["end"])})
                    else:
                        self._answer(_load(request["load"]))
        finally:
            self.close()

    def close(self) -> None:
        """Kill everything and remove the scratch folder."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it says what is being done already
        for pid in list(self._folders):
            self._end(pid)
        shutil.rmtree(self._root, ignore_errors=True)

    def _answer(self, answer: dict[str, Any]) -> None:
        self._channel.sendall(json.dumps(answer).encode("ascii") + b"\n")

    def _fork(self) -> None:
        theirs, ours = socket.socketpair()
        self._num_forked += 1
        folder = self._root / str(self._num_forked)
        folder.mkdir(mode=0o700)
        server = os.getpid()
        pid = os.fork()
        if pid == 0:
            theirs.close()
            _become_worker(self._channel, ours, folder, server)
        ours.close()
        self._folders[pid] = folder
        with theirs:
            line = json.dumps({"pid": pid}).encode("ascii") + b"\n"
            socket.send_fds(self._channel, [line], [theirs.fileno()])

    def _end(self, pid: int) -> int | None:
        """Kill a process, its group and the orphans that it left. Returns its wait status, None where the
        kernel does not let go of it."""
        folder = self._folders.pop(pid, None)
        if folder is None:
            return None
        with contextlib.suppress(ProcessLookupError):  # it may have left its group, or not yet made one
            os.killpg(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        status = _reaped(pid)
        self._kill_orphans()
        shutil.rmtree(folder, ignore_errors=True)
        return status

    def _kill_orphans(self) -> None:
        """Processes that a verifier started in a session of their own become ours when it ends."""
        for _ in range(10):  # an orphan's own children come to us when it dies
            orphans = [pid for pid in _children() if pid not in self._folders]
            if not orphans:
                return
            for pid in orphans:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                _reaped(pid)


def _load(target: str) -> dict[str, Any]:
    try:
        verifier = registry.get(target)
        if verifier.prepare is not None:
            verifier.prepare()
    except (Exception, SystemExit) as error:  # a verifier's module may raise anything; the trainer reports it
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    if threading.active_count() > 1 or len(os.listdir("/proc/self/task")) > 1:
        return {
            "error": f"importing {target} starts threads, which would be missing in a forked process; start "
            "them at the first call"
        }
    gc.collect()
    gc.freeze()  # a collection in a forked process would copy every page
    return {}


def _become_worker(server_channel: socket.socket, channel: socket.socket, folder: Path, server: int) -> None:
    """The forked process's whole life; does not return."""
    status = 1
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == server:  # otherwise it died before the line above
            os.close(server_channel.detach())  # close() would leave it to the reader that is open on it
            prepare_process(folder)
            serve(channel)
        status = 0
    finally:
        os._exit(status)


def _reaped(pid: int) -> int | None:
    deadline = time.monotonic() + _REAP_SECONDS
    while True:
        try:
            found, status = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            return None
        if found:
            return status
        if time.monotonic() > deadline:
            return None
        time.sleep(0.0005)


def _children() -> list[int]:
    """Our child processes, zombies included."""
    with contextlib.suppress(FileNotFoundError):  # a kernel without CONFIG_PROC_CHILDREN
        return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    return []


def prctl(option: int, value: int) -> None:
    """Linux's prctl. Raises OSError."""
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl {option}: {os.strerror(number)}")


def main() -> None:
    """Serve the trainer that started this process, and end with it."""
    descriptor, parent, root = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])

    def end(*_: object) -> None:
        # The kernel sends this when the thread that started us ends; the trainer may live on.
        if os.getppid() != parent:
            sys.exit()

    signal.signal(signal.SIGTERM, end)
    prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    prctl(_PR_SET_CHILD_SUBREAPER, 1)
    prctl(_PR_SET_NO_NEW_PRIVS, 1)
    prctl(_PR_SET_DUMPABLE, 0)  # no other process of this user may read or change our memory
    end()
    with socket.socket(fileno=descriptor) as channel:
        ForkServer(channel, root).run()


if __name__ == "__main__":
    main()
