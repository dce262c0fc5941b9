"""Verifiers in processes of their own: what a response does there stays there.

**The threat.** Responses are written by a model that is rewarded for whatever scores. A verifier that gets
one may take for ever, eat the memory, crash in C, leave processes behind, print, or (a verifier of the user's
that executes code, or a parser with a hole) run what the response says.

**How it is built.** The trainer holds CUDA, Gloo, vLLM and threads, and is never forked. It starts one *fork
server* (``fork_server.py``), which imports the verifiers and never sees a response, and asks it for *workers*
(``worker.py``), each a fork that has everything imported. Starting one takes milliseconds, so that it costs
no more to replace a worker than to use it:

- A verifier marked ``reusable`` promises to evaluate nothing. Its workers go on to the next response, under a
  guard (``guard.py``) that ends the process before it runs foreign code.
- Any other verifier gets a new worker for every response, and that worker ends with it.
- A worker that has hung, crashed, or answered something that is no answer is killed, with its process group
  and the orphans that it left.

**What holds.**

- No response changes the grade of another. What it does to the process (replacing functions, filling caches)
  is gone before the next response, and its socket carries answers to its own request only, by a random id. A
  crash counts only if it happens again while nothing else is being graded, since one response might kill the
  worker of another.
- Every response gets its full time. Waiting for a processor does not count (up to ``_PATIENCE`` times the
  limit in all), so that a busy machine does not change grades. Calls that take long do not hold up the
  others: further ones start beside them.
- ``run`` ends: with ``max_seconds``, what is not graded by then is given up, and says so. Neither reading nor
  writing waits without a limit.
- Workers die with the trainer: the kernel tells the fork server, which kills what it has forked.
- A worker has an environment of six harmless variables, an empty scratch folder that is removed when it ends,
  no descriptor of the trainer's, nothing to print to, and limits on memory, files and core dumps. Verifiers
  of one rank take at most (``num_workers`` + 4) x 2 GiB together: ``_MAX_SLOW`` calls may run beside the
  workers, and ``worker.MAX_DATA_BYTES`` bounds each.

**What does not hold**, and needs a sandbox: code that a verifier does execute runs as the trainer's user. It
can read and write that user's files, use the network, signal its processes, and grade *its own* response. The
built-in verifiers execute nothing (``reasoning_gym_scores.py`` says how that is known). The module of a
verifier is imported by the fork server and trusted.
"""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
import selectors
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from copd_megatron.rewards.guard import EXIT_STATUS
from copd_megatron.rewards.processes import START_SECONDS, ForkServer, ServerGoneError, Worker

__all__ = ["START_SECONDS", "Call", "Outcome", "PoolRun", "WorkerPool"]

logger = logging.getLogger(__name__)

_SLOW_SHARE = 0.1
"""Of its time limit: a call that has taken this long no longer keeps the next one from starting."""
_MAX_SLOW = 4
"""How many slow calls may run beside the ``num_workers`` others."""
_MAX_RESTARTS = 3
_PATIENCE = 3.0
"""Most that a call may take in all, as a multiple of its limit, waiting for a processor included."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One verifier call, to run in a worker."""

    target: str
    """``module:attribute`` of the verifier."""
    response: str
    answer: str
    metadata: Mapping[str, Any]
    reusable: bool = False
    """The verifier evaluates nothing that it is given, so its worker may go on to the next call."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a call: a value, or why there is none."""

    value: float | None = None
    reason: str | None = None
    """``error`` (it raised), ``timeout``, ``crash`` (the process died, or sent no proper answer),
    ``bad_request``, or ``given_up``: no time was left, which says nothing about the response."""
    message: str = ""


@dataclass(eq=False, kw_only=True)
class _Task:
    """A call on its way."""

    index: int
    call: Call
    id: str
    line: bytes
    started: float = 0.0
    in_queue_before: float = 0.0
    """Seconds that its worker had waited for a processor before."""
    deadline: float = 0.0
    num_loaded: int = 0
    """Verifiers that its worker has."""
    is_shared: bool = False
    """Another call was being graded at the same time."""

    def begin(self, worker: Worker, limit_seconds: float) -> None:
        self.started = time.monotonic()
        self.in_queue_before = worker.seconds_in_queue()
        self.deadline = self.started + limit_seconds
        worker.send(self.line)


class WorkerPool:
    """Runs verifier calls, ``num_workers`` at a time and slow ones beside them.

    Raises ValueError for fewer than one worker or a time limit that is not positive.
    """

    def __init__(self, num_workers: int, timeout_seconds: float) -> None:
        if num_workers < 1 or timeout_seconds <= 0:
            raise ValueError(
                f"reward.num_workers is {num_workers} and reward.timeout_seconds {timeout_seconds}; "
                "both must be positive."
            )
        self._num_workers = num_workers
        self._timeout_seconds = timeout_seconds
        self._server = ForkServer()
        self._idle: list[Worker] = []
        self._num_loaded = 0
        self._finalizer = weakref.finalize(self, self._server.close)

    def run(self, calls: Sequence[Call], *, max_seconds: float | None = None) -> list[Outcome]:
        """Run all calls; outcomes in their order.

        ``max_seconds``: after so long (loading verifiers not counted), what is not graded is given up.

        Raises RuntimeError if workers cannot be started or cannot import a verifier: no sample's fault.
        """
        with self.begin() as run:
            for call in calls:
                run.add(call)
            return run.outcomes(max_seconds)

    def begin(self) -> PoolRun:
        """Calls that come one after another, while the caller does something else. One at a time."""
        return PoolRun(self)

    def close(self) -> None:
        """End the workers. The pool may be used again; it starts new ones."""
        self._idle.clear()
        self._server.close()

    def _load(self, calls: Sequence[Call]) -> None:
        for target in dict.fromkeys(call.target for call in calls):
            if self._server.load(target):
                self._end_idle()  # they were forked without it
                self._num_loaded += 1

    def _end_idle(self) -> None:
        while self._idle:
            self._server.end(self._idle.pop())

    def _worker_for(self, call: Call) -> Worker:
        """A worker that has seen no response, or only responses that were not evaluated."""
        while call.reusable and self._idle:
            worker = self._idle.pop()
            if worker.is_quiet():
                return worker
            self._server.end(worker)
        return self._server.fork()


@dataclass
class PoolRun:
    """What waits, what is being graded, what is done. Ends its workers at the end of the block."""

    pool: WorkerPool
    calls: list[Call] = field(default_factory=list)
    done: list[Outcome | None] = field(default_factory=list)
    in_flight: dict[Worker, _Task] = field(default_factory=dict)
    waiting: deque[_Task] = field(default_factory=deque)
    suspects: deque[_Task] = field(default_factory=deque)
    """Calls whose process died while others were being graded; each is graded again, alone."""
    num_restarts: int = 0
    """Of the fork server, since the last call was settled."""

    def add(self, call: Call) -> None:
        """One more call. It starts with the next ``poll`` or ``outcomes`` that finds a free worker.

        Raises RuntimeError as ``WorkerPool.run`` does.
        """
        self.pool._load([call])
        index = len(self.calls)
        self.calls.append(call)
        self.done.append(None)
        try:
            self.waiting.append(_task(index, call))
        except (TypeError, ValueError, RecursionError) as error:
            self.done[index] = Outcome(reason="bad_request", message=f"metadata is not JSON: {error}"[:500])

    def poll(self) -> None:
        """Starts what has room and takes what has ended, without waiting. Raises as ``WorkerPool.run``."""
        self._advance(time.monotonic())

    def outcomes(self, max_seconds: float | None = None) -> list[Outcome]:
        """Waits for the rest; the outcomes of all calls, in their order.

        ``max_seconds`` from now, what is not graded is given up. Raises as ``WorkerPool.run``.
        """
        end = time.monotonic() + max_seconds if max_seconds is not None else float("inf")
        while (self.waiting or self.suspects or self.in_flight) and time.monotonic() < end:
            self._advance(end)
        given_up = Outcome(reason="given_up", message=f"not graded within {max_seconds or 0:g} s")
        return [given_up if outcome is None else outcome for outcome in self.done]

    def _advance(self, end: float) -> None:
        """Starts what has room, waits for something to happen, but not beyond ``end``, and takes it."""
        self._start_calls()
        self._wait(end)
        for worker, task in list(self.in_flight.items()):
            outcome = self._settled(worker, task)
            if outcome is not None:
                self.done[task.index] = outcome
                self.num_restarts = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the workers that are still at work."""
        for worker in list(self.in_flight):
            self._end(worker)

    # ---- starting ----------------------------------------------------------------------------------------

    def _start_calls(self) -> None:
        while self.waiting and self._has_room():
            self._start(self.waiting)
        if self.suspects and not self.waiting and not self.in_flight:
            self._start(self.suspects)

    def _has_room(self) -> bool:
        num_slow = sum(time.monotonic() >= self._slow_at(task) for task in self.in_flight.values())
        return len(self.in_flight) - min(num_slow, _MAX_SLOW) < self.pool._num_workers

    def _slow_at(self, task: _Task) -> float:
        return task.started + _SLOW_SHARE * self.pool._timeout_seconds

    def _start(self, queue: deque[_Task]) -> None:
        try:
            worker = self.pool._worker_for(queue[0].call)
        except ServerGoneError as error:
            self._restart(error)
            return
        task = queue.popleft()
        task.is_shared = bool(self.in_flight)
        for other in self.in_flight.values():
            other.is_shared = True
        task.begin(worker, self.pool._timeout_seconds)
        task.num_loaded = self.pool._num_loaded
        self.in_flight[worker] = task

    def _restart(self, error: ServerGoneError) -> None:
        """All workers are gone with the server: what they were grading is graded again.

        Raises RuntimeError if nothing could be graded since the last few restarts.
        """
        self.num_restarts += 1
        if self.num_restarts > _MAX_RESTARTS:
            raise RuntimeError(
                f"grading processes cannot be started, {_MAX_RESTARTS} attempts in a row: {error}. Check the "
                "machine's limits on memory and processes."
            ) from error
        logger.warning("the grading processes are started again: %s", error)
        for worker, task in self.in_flight.items():
            worker.close()
            self.suspects.append(task)
        self.in_flight.clear()
        self.pool.close()
        self.pool._load(self.calls)

    # ---- waiting and settling ----------------------------------------------------------------------------

    def _wait(self, end: float) -> None:
        if not self.in_flight:
            return
        now = time.monotonic()
        times = [task.deadline for task in self.in_flight.values()]
        if self.waiting:
            times += [when for task in self.in_flight.values() if (when := self._slow_at(task)) > now]
        with selectors.DefaultSelector() as selector:
            for worker in self.in_flight:
                writing = selectors.EVENT_WRITE if worker.is_sending else 0
                selector.register(worker, selectors.EVENT_READ | writing)
            selector.select(max(0.0, min(*times, end) - now))

    def _settled(self, worker: Worker, task: _Task) -> Outcome | None:
        """The outcome of a call, None while it is being graded or is to be graded again."""
        try:
            line = worker.advance()
        except EOFError as error:
            return self._crashed(worker, task, str(error))
        if line is not None:
            outcome = _read(line, task)
            if outcome is None:
                return self._crashed(worker, task, "it sent what is not an answer")
            self._finish(worker, task)
            return outcome
        if time.monotonic() >= task.deadline and not self._extended(worker, task):
            self._end(worker)
            return Outcome(reason="timeout", message=f"took longer than {self.pool._timeout_seconds:g} s")
        return None

    def _extended(self, worker: Worker, task: _Task) -> bool:
        """Give a call back the time that it has waited for a processor."""
        limit = self.pool._timeout_seconds
        waited = worker.seconds_in_queue() - task.in_queue_before
        deadline = task.started + min(limit + waited, _PATIENCE * limit)
        if deadline <= time.monotonic():
            return False
        task.deadline = deadline
        return True

    def _finish(self, worker: Worker, task: _Task) -> None:
        has_all = task.num_loaded == self.pool._num_loaded
        if task.call.reusable and has_all and len(self.pool._idle) < self.pool._num_workers:
            del self.in_flight[worker]
            self.pool._idle.append(worker)
        else:
            self._end(worker)

    def _crashed(self, worker: Worker, task: _Task, what: str) -> Outcome | None:
        how = self._end(worker)
        if task.is_shared:
            self.suspects.append(task)
            return None
        if how == f"exit status {EXIT_STATUS}":
            how = "it was about to run code that the response may have written"
        return Outcome(reason="crash", message=f"the grading process died: {what} ({how})")

    def _end(self, worker: Worker) -> str:
        self.in_flight.pop(worker, None)
        try:
            return self.pool._server.end(worker)
        except ServerGoneError as error:  # and the worker with it; the next start notices
            return str(error)


def _task(index: int, call: Call) -> _Task:
    request_id = secrets.token_hex(16)
    request = {
        "id": request_id,
        "target": call.target,
        "guarded": call.reusable,
        "response": call.response,
        "answer": call.answer,
        "metadata": dict(call.metadata),
    }
    return _Task(index=index, call=call, id=request_id, line=json.dumps(request).encode("ascii") + b"\n")


def _read(line: bytes, task: _Task) -> Outcome | None:
    """The outcome that an answer tells; None where it is no answer to this request."""
    answer: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        answer = json.loads(line)
    match answer:
        case {"id": task.id, "value": float() as value, **rest} if not rest:
            return Outcome(value=value)
        case {"id": task.id, "error": str() as error, **rest} if not rest:
            return Outcome(reason="error", message=error)
    return None
