"""Operations with a time limit that say who waits for whom.

Every rank tells the job's store which operation it is in (``with watch.operation("opd.score"):``, nested at
will), and one of its threads writes a heartbeat. When a rank has been in one operation for longer than its
limit, without entering or leaving another, the job ends (``job_end``): the rank reports who waits for whom,
all ranks dump their Python stacks, and the processes exit with ``EXIT_STUCK``. When a collective fails by
itself (a peer died, the backend timed out), the operation raises ``CollectiveError`` with the same table.

A rank that hangs outside any operation is found by the ranks that wait for it. Every rank measures elapsed
seconds with its own clock, and death shows in two reads of the heartbeat's number, so clocks need not agree.

Cost: one fire-and-forget message per entry or exit (about 10 microseconds), and per heartbeat (at most every
two seconds) one message and one query; a thousand ranks load the store with a thousand messages a second.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from torch.distributed import DistError, Store

from copd_megatron.topology.job_end import EXIT_STUCK, JobEnd, Suspect, Verdict
from copd_megatron.topology.rank_table import read_table, write_beat, write_state
from copd_megatron.topology.who_waits import CLOSED, EXITED, FAILED, RUNNING, RankState, format_report

__all__ = ["EXIT_STUCK", "CollectiveError", "Operation", "Watch", "WatchError", "is_collective_failure"]

logger = logging.getLogger(__name__)

_BACKEND_MARKS = (
    "gloo",
    "NCCL",
    "ProcessGroup",
    "Connection closed by peer",
    "Connection reset",
    "Broken pipe",
)


class CollectiveError(RuntimeError):
    """A collective failed inside an operation: a peer died, or the backend's own timeout expired.

    The backend's exception is the cause (``__cause__``).
    """

    def __init__(self, message: str, *, branch: str, rank: int, operation: str, seconds: float) -> None:
        super().__init__(message)
        self.branch = branch
        self.rank = rank
        """Global rank."""
        self.operation = operation
        self.seconds = seconds
        """Spent in the operation."""


class WatchError(RuntimeError):
    """The watch was used in a way that would make its table wrong."""


def is_collective_failure(error: BaseException) -> bool:
    """Whether an exception comes from a communication backend (Gloo raises plain ``RuntimeError``)."""
    if isinstance(error, CollectiveError):
        return False
    if isinstance(error, DistError):
        return True
    return type(error) is RuntimeError and any(mark in str(error) for mark in _BACKEND_MARKS)


@dataclass(frozen=True, slots=True)
class _Current:
    """What this rank is doing. Replaced as a whole, so that the threads read it without a lock."""

    count: int
    path: str
    since: float
    """Monotonic time of the last entry or exit."""
    timeout_seconds: float
    ranks: tuple[int, ...] | None
    status: str


class Operation:
    """Context manager made by ``Watch.operation``."""

    __slots__ = ("_watch", "name", "ranks", "started", "timeout_seconds")

    def __init__(
        self, watch: Watch, name: str, timeout_seconds: float, ranks: tuple[int, ...] | None
    ) -> None:
        self._watch = watch
        self.name = name
        self.timeout_seconds = timeout_seconds
        self.ranks = ranks
        self.started = 0.0

    def __enter__(self) -> Self:
        self.started = time.monotonic()
        self._watch._enter(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failed = error is not None
        if error is not None and is_collective_failure(error):
            try:
                raise self._watch._collective_error(self, error) from error
            finally:
                self._watch._leave(self, failed=True)
        self._watch._leave(self, failed=failed)


class Watch:
    """This rank's operations, and the threads that observe them.

    Operations nest, so only the thread that made the watch (the training loop's) may enter them.

    Args:
        store: the job's store. The watch makes connections of its own, since a client that blocks in one
            thread blocks its other users.
        rank: global rank.
        branch_ranks: branch name to global ranks, for every branch.
        timeout_seconds: how long an operation may last without progress.
        report_dir: reports and stacks are also written there (``stuck_rank_00003.txt``).
        hosts_store: this process serves the store, so it ends last.
        store_rank: global rank that serves the store; None: the launcher does.
        heartbeat_seconds: between two heartbeats; None: a sixtieth of the limit, between 0.25 and 2 s.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        branch_ranks: Mapping[str, Sequence[int]],
        *,
        timeout_seconds: float,
        report_dir: Path | None = None,
        hosts_store: bool = False,
        store_rank: int | None = None,
        heartbeat_seconds: float | None = None,
    ) -> None:
        if timeout_seconds <= 0:
            raise ValueError(f"timeout_seconds is {timeout_seconds}; give a positive number of seconds")
        self.rank = rank
        self.timeout_seconds = timeout_seconds
        self.heartbeat_seconds = heartbeat_seconds or min(max(timeout_seconds / 60, 0.25), 2.0)
        self._places = {g: (branch, i) for branch, ranks in branch_ranks.items() for i, g in enumerate(ranks)}
        if rank not in self._places:
            raise ValueError(f"rank {rank} is in no branch of {dict(branch_ranks)}")
        self.branch, self.branch_rank = self._places[rank]
        self._job_end = JobEnd(
            store,
            self._places,
            heartbeat_seconds=self.heartbeat_seconds,
            report_dir=report_dir,
            hosts_store=hosts_store,
            store_rank=store_rank,
        )
        # torch's type stubs lack Store.clone
        self._publisher: Store = store.clone()  # type: ignore[attr-defined]
        self._monitor: Store = store.clone()  # type: ignore[attr-defined]
        self._store_lost = False
        self._stack: list[Operation] = []
        self._thread_id = threading.get_ident()
        self._current = _Current(0, "", time.monotonic(), timeout_seconds, None, RUNNING)
        self._stop = threading.Event()
        self.recorder: Callable[[str, float, float], None] | None = None
        """Called for every operation that ends, with its path and its monotonic begin and end."""
        self._publish()
        write_beat(self._monitor, self._mine(), 0)
        self._verdict: Verdict | None = None
        """Of another rank, by which the job ends."""
        # a store whose host is frozen answers nobody, so the thread that observes limits must not ask it
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for target, name in ((self._mind, "copd-watch"), (self._keep_in_touch, "copd-watch-store"))
        ]
        for thread in self._threads:
            thread.start()
        atexit.register(self._abandon)

    def operation(
        self, name: str, *, timeout_seconds: float | None = None, ranks: Iterable[int] | None = None
    ) -> Operation:
        """Context manager around something that may wait for other ranks.

        Args:
            name: as reports show it, such as ``opd.score image<-text``.
            timeout_seconds: how long it may last without progress; None: the watch's limit.
            ranks: global ranks that take part, so that a report accuses nobody else; None: everybody may.

        Raises:
            CollectiveError: at the end, if the block raised an exception of a communication backend.
        """
        limit = self.timeout_seconds if timeout_seconds is None else timeout_seconds
        return Operation(self, name, limit, None if ranks is None else tuple(ranks))

    def table(self) -> list[RankState]:
        """Every rank's state, by global rank. Waits 2.5 heartbeats, to see which ranks are dead.

        Call it from the thread that uses the watch. Raises RuntimeError if the store does not answer.
        """
        return read_table(self._publisher, self._places, self.heartbeat_seconds, self._mine())

    def close(self) -> None:
        """Stops the threads; the others see this rank as finished. Safe to call twice."""
        self._end(CLOSED)

    def fail(self, hopeless: str | None = None) -> None:
        """Stops the threads; the others see this rank as failed in its current operation.

        Args:
            hopeless: why no restart can mend it, where none can: the other ranks then end at once, with the
                exit status that says so.
        """
        self._end(FAILED)
        if hopeless is not None:
            me = self._mine()
            self._job_end.hopeless(f"{me.label} (global rank {me.rank}): {hopeless}")

    def _abandon(self) -> None:
        self._end(EXITED)

    def _end(self, status: str) -> None:
        if self._stop.is_set():
            return
        self._stop.set()
        atexit.unregister(self._abandon)
        self._current = replace(self._current, status=status)
        self._publish()
        for thread in self._threads:
            if threading.current_thread() is not thread:
                thread.join(timeout=5.0)

    # ---- the thread that uses the watch ----------------------------------------------------------------

    def _enter(self, operation: Operation) -> None:
        if threading.get_ident() != self._thread_id:
            raise WatchError(
                f"operation {operation.name!r} entered in thread {threading.current_thread().name!r}: "
                "a watch belongs to the thread that made it, so run the collective there"
            )
        self._stack.append(operation)
        self._set_current(RUNNING, entered=1)

    def _leave(self, operation: Operation, *, failed: bool) -> None:
        assert self._stack and self._stack[-1] is operation
        path = self._current.path
        if self.recorder is not None:
            self.recorder(path, operation.started, time.monotonic())
        self._stack.pop()
        self._set_current(FAILED if failed else RUNNING)
        if failed:
            # the others see where it failed, however far the exception unwinds
            self._current = replace(self._current, path=path)
            self._publish()

    def _set_current(self, status: str, entered: int = 0) -> None:
        top = self._stack[-1] if self._stack else None
        self._current = _Current(
            self._current.count + entered,
            " > ".join(operation.name for operation in self._stack),
            time.monotonic(),
            top.timeout_seconds if top else float("inf"),
            top.ranks if top else None,
            status,
        )
        if status != FAILED:
            self._publish()

    def _publish(self) -> None:
        try:
            write_state(self._publisher, self._mine())
        except RuntimeError as error:
            # the store's host is gone, so the job is ending; the collectives themselves will say so
            if not self._store_lost:
                logger.warning("watch: the job's store does not answer, reports will be local: %s", error)
            self._store_lost = True

    def _collective_error(self, operation: Operation, error: BaseException) -> CollectiveError:
        seconds = time.monotonic() - operation.started
        path = self._current.path
        headline = (
            f"{self.branch} rank {self.branch_rank} (global rank {self.rank}): operation {path!r} failed "
            f"after {seconds:.1f} s"
        )
        logger.error("%s: %s", headline, error)
        mine = self._mine()
        try:
            report = format_report(mine, self.table(), operation.ranks)
        except RuntimeError as store_error:
            report = f"the job's store does not answer either ({store_error}): its host has ended"
        return CollectiveError(
            f"{headline}: {error}\n{report}",
            branch=self.branch, rank=self.rank, operation=operation.name, seconds=seconds,
        )  # fmt: skip

    def _mine(self) -> RankState:
        return self._state_of(self._current)

    def _state_of(self, current: _Current) -> RankState:
        return RankState(
            rank=self.rank, branch=self.branch, branch_rank=self.branch_rank, status=current.status,
            path=current.path, count=current.count, seconds=time.monotonic() - current.since,
        )  # fmt: skip

    # ---- the watch's own threads -----------------------------------------------------------------------

    def _keep_in_touch(self) -> None:
        """Writes heartbeats, and looks whether another rank has ended the job."""
        number = 0
        while not self._stop.wait(self.heartbeat_seconds):
            number += 1
            try:
                write_beat(self._monitor, self._mine(), number)
                self._verdict = Verdict.read(self._monitor)
            except RuntimeError:
                # the publisher reports it; without the store, this rank still observes its own limit
                self._verdict = None

    def _mind(self) -> None:
        """Ends the job when an operation has been at its limit, or the process when the job ends."""
        while not self._stop.wait(self.heartbeat_seconds):
            current, verdict = self._current, self._verdict
            expired = time.monotonic() - current.since > current.timeout_seconds
            if verdict is not None and verdict.hopeless:
                self._job_end.obey(verdict)
            if expired or verdict is not None:
                self._job_end.stuck(self._suspect(current))

    def _suspect(self, current: _Current) -> Suspect:
        return Suspect(
            state=self._state_of(current),
            limit_seconds=current.timeout_seconds,
            ranks=current.ranks,
            moved_on=lambda: self._current is not current or self._stop.is_set(),
        )
