"""Worker processes for verifiers that might hang or crash, each killed and replaced when it does.

The trainer's process holds CUDA, Gloo and vLLM state and threads, so it is never forked: workers are fresh
interpreters (``subprocess``), kept for the whole run. A thread would be lighter, but cannot be stopped.
Each worker has one request in flight; nothing here uses signals or threads.
"""

from __future__ import annotations

import json
import logging
import os
import selectors
import signal
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

START_SECONDS = 120.0
"""For starting a worker and importing a verifier; slow only on a cold shared file system."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One verifier call, to run in a worker."""

    target: str
    """``module:attribute`` of the verifier."""
    response: str
    answer: str
    metadata: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a call: a value, or why there is none."""

    value: float | None = None
    reason: str | None = None
    """``error`` (it raised), ``timeout``, ``crash`` (the process died), ``bad_request``."""
    message: str = ""


class WorkerPool:
    """``num_workers`` persistent workers, started when first needed.

    Raises ValueError for fewer than one worker or a time limit that is not positive.
    """

    def __init__(self, num_workers: int, timeout_seconds: float) -> None:
        if num_workers < 1 or timeout_seconds <= 0:
            raise ValueError(
                f"reward.num_workers is {num_workers} and reward.timeout_seconds {timeout_seconds}; "
                "both must be positive."
            )
        self._timeout_seconds = timeout_seconds
        self._workers = [_Worker(timeout_seconds) for _ in range(num_workers)]
        self._finalizer = weakref.finalize(self, _kill_all, self._workers)

    def run(self, calls: Sequence[Call]) -> list[Outcome]:
        """Run all calls; outcomes in their order.

        Raises RuntimeError if a worker cannot start or cannot import a verifier: no sample's fault.
        """
        outcomes: list[Outcome | None] = [None] * len(calls)
        waiting: deque[tuple[int, str]] = deque()
        for index, call in enumerate(calls):
            try:
                waiting.append((index, _encode(call)))
            except (TypeError, ValueError) as error:
                outcomes[index] = Outcome(reason="bad_request", message=f"metadata is not JSON: {error}")
        in_flight: dict[_Worker, int] = {}
        with selectors.DefaultSelector() as selector:
            while waiting or in_flight:
                for worker in self._workers:
                    if waiting and worker not in in_flight:
                        index, line = waiting.popleft()
                        if self._begin(worker, calls[index], line):
                            in_flight[worker] = index
                            selector.register(worker.stdout, selectors.EVENT_READ, worker)
                        else:
                            outcomes[index] = Outcome(reason="crash", message="the worker died when called")
                self._wait(selector, in_flight)
                for worker, index in list(in_flight.items()):
                    outcome = self._poll(worker)
                    if outcome is not None:
                        selector.unregister(worker.stdout)
                        if outcome.reason in ("timeout", "crash"):
                            worker.kill()
                        del in_flight[worker]
                        outcomes[index] = outcome
        return [outcome for outcome in outcomes if outcome is not None]

    def close(self) -> None:
        """End the workers. The pool may be used again; it starts new ones."""
        _kill_all(self._workers)

    def _begin(self, worker: _Worker, call: Call, line: str) -> bool:
        worker.ensure_loaded(call.target)
        return worker.send(line, self._timeout_seconds)

    def _wait(self, selector: selectors.BaseSelector, in_flight: Mapping[_Worker, int]) -> None:
        if in_flight:
            soonest = min(worker.deadline for worker in in_flight)
            selector.select(max(0.0, soonest - time.monotonic()))

    def _poll(self, worker: _Worker) -> Outcome | None:
        """The outcome of a worker's call, None while it is at work."""
        try:
            line = worker.receive_now()
        except EOFError:
            return Outcome(reason="crash", message=f"the worker process died ({worker.exit_text()})")
        if line is not None:
            answer = json.loads(line)
            if "value" in answer:
                return Outcome(value=answer["value"])
            return Outcome(reason="error", message=answer["error"])
        if time.monotonic() >= worker.deadline:
            return Outcome(reason="timeout", message=f"took longer than {self._timeout_seconds:g} s")
        return None


def _encode(call: Call) -> str:
    request = {
        "target": call.target,
        "response": call.response,
        "answer": call.answer,
        "metadata": dict(call.metadata),
    }
    return json.dumps(request)


def _kill_all(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.kill()


class _Worker:
    """One worker process, its pipes, and what it has loaded."""

    def __init__(self, timeout_seconds: float) -> None:
        self.deadline = 0.0
        self._watchdog_seconds = 2 * max(timeout_seconds, START_SECONDS)
        self._process: subprocess.Popen[bytes] | None = None
        self._loaded: set[str] = set()
        self._buffer = bytearray()

    @property
    def stdout(self) -> int:
        """Descriptor that the answers arrive on."""
        assert self._process is not None and self._process.stdout is not None
        return self._process.stdout.fileno()

    def ensure_loaded(self, target: str) -> None:
        """Start the process if it is not running, and import the verifier. Raises RuntimeError."""
        if self._process is None or self._process.poll() is not None:
            self.kill()
            self._start()
        if target in self._loaded:
            return
        try:
            sent = self.send(json.dumps({"load": target}), START_SECONDS)
            line = self._receive() if sent else None
        except EOFError:
            line = None
        answer = json.loads(line) if line is not None else {"error": self.exit_text()}
        if "error" in answer:
            self.kill()
            raise RuntimeError(
                f"verifier {target} cannot be loaded in a worker process ({answer['error']}). Check that its "
                f"module imports on its own within {START_SECONDS:g} s: {sys.executable} -c 'import "
                f"{target.partition(':')[0]}'."
            )
        self._loaded.add(target)

    def _start(self) -> None:
        # Hashing is seeded so that nothing depends on set order: same response, same grade.
        environment = {**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-W",
                "ignore",
                "-m",
                "copd_megatron.rewards.worker",
                str(self._watchdog_seconds),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=environment,
            start_new_session=True,  # so that it can be killed together with what a verifier has started
        )

    def send(self, line: str, limit_seconds: float) -> bool:
        """Send a request; False if the process is gone."""
        assert self._process is not None and self._process.stdin is not None
        self.deadline = time.monotonic() + limit_seconds
        data = memoryview(line.encode("ascii") + b"\n")
        try:
            while data:
                data = data[self._process.stdin.write(data) or 0 :]
        except BrokenPipeError:
            self.kill()
            return False
        return True

    def receive_now(self) -> bytes | None:
        """The answer if it has arrived whole. Raises EOFError if the process has ended."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.stdout, selectors.EVENT_READ)
            ready = selector.select(0)
        if ready:
            self._read()
        return self._line()

    def _receive(self) -> bytes | None:
        """The answer, None at the deadline."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.stdout, selectors.EVENT_READ)
            while (line := self._line()) is None:
                if not selector.select(max(0.0, self.deadline - time.monotonic())):
                    return None
                self._read()
        return line

    def _read(self) -> None:
        data = os.read(self.stdout, 1 << 16)
        if not data:
            raise EOFError
        self._buffer += data

    def _line(self) -> bytes | None:
        end = self._buffer.find(b"\n")
        if end < 0:
            return None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line

    def exit_text(self) -> str:
        """How the process ended, for messages."""
        if self._process is None:
            return "the process ended"
        try:
            code = self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return f"no answer within {START_SECONDS:g} s"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"

    def kill(self) -> None:
        """End the process and everything it started; the next ``ensure_loaded`` starts another."""
        process, self._process = self._process, None
        self._loaded.clear()
        self._buffer.clear()
        if process is None:
            return
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            logger.debug("worker %d had ended by itself", process.pid)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        process.wait()
