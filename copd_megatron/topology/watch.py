"""Operations with a time limit that say who waits for whom.

Every rank tells the job's TCPStore which operation it is in (``with watch.operation("opd.score"):``, nested
at will). A daemon thread beats like a heart. When a rank has been in one operation for longer than its limit
without entering or leaving another, the thread writes a report (this rank's branch, rank, operation and
seconds; what every other rank is in, who is behind, who is dead), asks all other ranks through the store to
dump their Python stacks, and ends the process with ``EXIT_STUCK``. When a collective fails by itself (a peer
died, the backend timed out), the operation raises ``CollectiveError`` with the same table.

A rank that hangs outside any operation is found by those that wait for it. Elapsed seconds are measured by
each rank's own clock, and death by two reads of the heartbeat counter, so that clocks need not agree.

Cost: one fire-and-forget message per entry or exit (about 10 microseconds), and per heartbeat (at most every
two seconds) one message and one query; a thousand ranks load the store with a thousand messages a second.
"""

from __future__ import annotations

import atexit
import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from torch.distributed import DistError, Store

from copd_megatron.topology.who_waits import (
    CLOSED,
    DEAD,
    EXITED,
    FAILED,
    RUNNING,
    UNKNOWN,
    RankState,
    format_report,
)

logger = logging.getLogger(__name__)

EXIT_STUCK: Final = 86
"""Exit code of a process that the watch ended."""

_BACKEND_MARKS = (
    "gloo",
    "NCCL",
    "ProcessGroup",
    "Connection closed by peer",
    "Connection reset",
    "Broken pipe",
)

_NOT_STUCK: Final = "the operation has ended"


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
        """Waited in the operation."""


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
    """What this rank is doing; replaced as a whole, so that the thread reads it without a lock."""

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
    """This rank's operations, and the thread that minds them.

    Use it from one thread (the training loop's): nesting is a property of one thread.

    Args:
        store: the job's store; the watch makes its own connections, since a client that blocks in one thread
            blocks its other users.
        rank: global rank.
        branch_ranks: branch name to global ranks, for every branch.
        timeout_seconds: limit on one operation without progress.
        report_dir: reports and stacks are also written there (``stuck_rank_00003.txt``).
        hosts_store: this process serves the store, and therefore ends last.
        store_rank: global rank that serves the store; None: the launcher does.
        heartbeat_seconds: between two heartbeats; None: a sixtieth of the limit, within 0.25 and 2 s.
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
        self._report_dir = report_dir
        self._hosts_store = hosts_store
        self._store_rank = store_rank
        self._store = store
        # torch's type stubs lack Store.clone.
        self._publisher: Store = store.clone()  # type: ignore[attr-defined]
        self._monitor: Store = store.clone()  # type: ignore[attr-defined]
        self._store_lost = False
        self._stack: list[Operation] = []
        self._thread_id = threading.get_ident()
        self._current = _Current(0, "", time.monotonic(), timeout_seconds, None, RUNNING)
        self._stop = threading.Event()
        self.recorder: Callable[[str, float, float], None] | None = None
        """Told of every operation when it is left: its path, and monotonic begin and end."""
        self._publish()
        self._beat(0)
        self._aborted = False
        # A store whose host is frozen answers nobody, so who minds the limits must not ask it.
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
            name: as it shall read in a report, such as ``opd.score image<-text``.
            timeout_seconds: limit without progress; None: the watch's.
            ranks: global ranks taking part, so that a report accuses nobody else; None: everybody may.

        Raises:
            CollectiveError: on leaving, when the block raised an exception of a communication backend.
        """
        limit = self.timeout_seconds if timeout_seconds is None else timeout_seconds
        return Operation(self, name, limit, None if ranks is None else tuple(ranks))

    def table(self) -> list[RankState]:
        """Every rank's state, by global rank, after waiting long enough (about 2.5 heartbeats) to tell the
        dead.

        Call it from the watch's own thread of use. Raises ``torch.distributed.DistError`` if the store is
        gone.
        """
        return self._read_table(self._publisher)

    def close(self) -> None:
        """Stop the thread; others see this rank as finished. Safe to call twice."""
        self._end(CLOSED)

    def fail(self) -> None:
        """Stop the thread; others see this rank as failed in its current operation."""
        self._end(FAILED)

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

    # Bookkeeping of the thread of use.

    def _enter(self, operation: Operation) -> None:
        if threading.get_ident() != self._thread_id:
            raise WatchError(
                f"operation {operation.name!r} entered in thread {threading.current_thread().name!r}: "
                "a watch belongs to the thread that made it; run the collective there"
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
            # Others shall read where it failed, whatever the exception unwinds on its way.
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
        current = self._current
        try:
            self._publisher.set(
                f"watch/state/{self.rank}", f"{current.count}\t{current.status}\t{current.path}"
            )
        except RuntimeError as error:
            # The store's host is gone, so the job is ending; the collectives themselves will say so.
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
            report = format_report(mine, self._read_table(self._publisher), operation.ranks)
        except RuntimeError as store_error:
            report = f"the job's store does not answer either ({store_error}): its host has ended"
        return CollectiveError(
            f"{headline}: {error}\n{report}",
            branch=self.branch, rank=self.rank, operation=operation.name, seconds=seconds,
        )  # fmt: skip

    def _mine(self) -> RankState:
        current = self._current
        return RankState(
            rank=self.rank, branch=self.branch, branch_rank=self.branch_rank, status=current.status,
            path=current.path, count=current.count, seconds=time.monotonic() - current.since,
        )  # fmt: skip

    # The thread.

    def _beat(self, number: int) -> None:
        current = self._current
        elapsed = time.monotonic() - current.since
        self._monitor.set(
            f"watch/beat/{self.rank}", f"{number}\t{current.count}\t{current.status}\t{elapsed:.3f}"
        )

    def _keep_in_touch(self) -> None:
        """Beats, and asks whether another rank has ended the job."""
        number = 0
        while not self._stop.wait(self.heartbeat_seconds):
            number += 1
            try:
                self._beat(number)
                self._aborted = self._monitor.check(["watch/abort"])
            except RuntimeError:
                # Reported by the publisher; without the store this rank still minds its own limit.
                self._aborted = False

    def _mind(self) -> None:
        while not self._stop.wait(self.heartbeat_seconds):
            current = self._current
            expired = time.monotonic() - current.since > current.timeout_seconds
            if (expired or self._aborted) and not self._stop.is_set():
                self._end_process(current)

    def _moved_on(self, current: _Current) -> bool:
        """Whether the thread of use has left the state that it was suspected in."""
        return self._current is not current or self._stop.is_set()

    def _end_process(self, current: _Current) -> None:
        """Report, dump stacks, and end the process. Returns only if the operation has ended after all."""
        me = f"{self.branch} rank {self.branch_rank} (global rank {self.rank})"
        where = f"operation {current.path!r}" if current.path else "no operation"
        waited = time.monotonic() - current.since
        headline = f"watch: {me} in {where} without progress for {waited:.0f} s"
        if current.timeout_seconds != float("inf"):
            headline += f" (limit {current.timeout_seconds:.0f} s)"
        patience = 8 * self.heartbeat_seconds + 6.0
        answer = _answer_within(patience, lambda: self._agree_on_end(headline, current))
        if isinstance(answer, str) or (self._moved_on(current) and not isinstance(answer, tuple)):
            return
        if isinstance(answer, tuple):
            leader, report = answer
        else:
            leader, report = True, self._silent_store(patience, answer)
        self._emit(f"{headline}\n{report}", stacks_to_stderr=leader or self._report_dir is None)
        if isinstance(answer, tuple):
            seconds = 4 * self.heartbeat_seconds + 2.0
            _answer_within(seconds + 1.0, lambda: self._wait_for_reports(seconds))
        if self._hosts_store:
            time.sleep(1.0)
        os._exit(EXIT_STUCK)

    def _agree_on_end(self, headline: str, current: _Current) -> tuple[bool, str] | str:
        """Whether this rank is the one that reports for all, and what it has to say; or ``_NOT_STUCK``.

        Finding out who waits for whom takes a while, and the operation may end in it. So the job is ended
        only when that is done and the operation is still the same.
        """
        mine = self._mine()
        store: Store = self._store.clone()  # type: ignore[attr-defined]
        # Only one rank reads the table: a thousand at once would swamp the store.
        suspecting = store.compare_set("watch/suspecting", "", str(self.rank)).decode()
        if suspecting == str(self.rank) and not self._aborted:
            report = format_report(mine, self._read_table(store), current.ranks)
            if self._moved_on(current):
                store.delete_key("watch/suspecting")
                return _NOT_STUCK
            verdict = store.compare_set("watch/abort", "", headline).decode()
            if verdict == headline:
                return True, report
        elif not self._aborted and not self._told_to_end(store, current):
            if self._moved_on(current):
                return _NOT_STUCK
            # whoever was to report has gone silent itself
            store.compare_set("watch/abort", "", headline)
        time.sleep(3 * self.heartbeat_seconds)
        return False, f"asked to stop by: {store.get('watch/abort').decode()}"

    def _told_to_end(self, store: Store, current: _Current) -> bool:
        """Waits for the rank that reports to end the job, or for this rank's operation to end."""
        deadline = time.monotonic() + 4 * self.heartbeat_seconds + 2.0
        while time.monotonic() < deadline and not self._moved_on(current):
            if store.check(["watch/abort"]):
                return True
            time.sleep(self.heartbeat_seconds / 4)
        return store.check(["watch/abort"])

    def _silent_store(self, seconds: float, error: Exception | None) -> str:
        """What a report says when the store does not."""
        if error is not None:
            return f"the job's store does not answer ({error}): its host has ended"
        branch, i = self._places.get(-1 if self._store_rank is None else self._store_rank, ("", 0))
        host = f"{branch} rank {i} (global rank {self._store_rank})" if branch else "the launcher"
        return f"waiting for: {host}, frozen: it serves the job's store, silent for {seconds:.0f} s"

    def _emit(self, text: str, *, stacks_to_stderr: bool) -> None:
        """Log the report and dump all threads' stacks to stderr and to the report directory."""
        if self._report_dir is not None:
            path = self._report_dir / f"stuck_rank_{self.rank:05d}.txt"
            try:
                self._report_dir.mkdir(parents=True, exist_ok=True)
                with path.open("w") as file:
                    file.write(f"{text}\n\nstacks:\n")
                    file.flush()
                    faulthandler.dump_traceback(file=file, all_threads=True)
                text += f"\nstacks of every rank: {self._report_dir}/stuck_rank_*.txt"
            except OSError as error:
                text += f"\n(could not write {path}: {error})"
                stacks_to_stderr = True
        # A stuck main thread may hold a logging lock, so logging must not be able to stop the exit.
        log = threading.Thread(target=_log_and_flush, args=(text,), daemon=True)
        log.start()
        log.join(timeout=5.0)
        if log.is_alive():
            os.write(2, f"{text}\n".encode())
        if stacks_to_stderr:
            os.write(2, f"stacks of {self.branch} rank {self.branch_rank}:\n".encode())
            faulthandler.dump_traceback(file=2, all_threads=True)

    def _wait_for_reports(self, seconds: float) -> None:
        """Let every rank write its report before launchers notice the first exit and kill the rest."""
        deadline = time.monotonic() + seconds
        store: Store = self._store.clone()  # type: ignore[attr-defined]
        reported = store.add("watch/reported", 1)
        while reported < len(self._places) and time.monotonic() < deadline:
            time.sleep(self.heartbeat_seconds / 4)
            reported = store.add("watch/reported", 0)

    # Reading others.

    def _read_table(self, store: Store) -> list[RankState]:
        first = self._read_all(store, "beat")
        time.sleep(2.5 * self.heartbeat_seconds)
        second = self._read_all(store, "beat")
        states = self._read_all(store, "state")
        return [self._state(rank, states[rank], first[rank], second[rank]) for rank in sorted(self._places)]

    def _read_all(self, store: Store, kind: str) -> dict[int, tuple[str, ...] | None]:
        keys = {rank: f"watch/{kind}/{rank}" for rank in self._places}
        # A get of a missing key would block until the store's timeout.
        if store.check(list(keys.values())):
            values = dict(zip(keys, store.multi_get(list(keys.values())), strict=True))
        else:
            values = {rank: store.get(key) for rank, key in keys.items() if store.check([key])}
        return {rank: tuple(values[rank].decode().split("\t")) if rank in values else None for rank in keys}

    def _state(
        self,
        rank: int,
        state: tuple[str, ...] | None,
        first: tuple[str, ...] | None,
        second: tuple[str, ...] | None,
    ) -> RankState:
        branch, branch_rank = self._places[rank]
        if rank == self.rank:
            return self._mine()
        if state is None or second is None:
            return RankState(
                rank=rank,
                branch=branch,
                branch_rank=branch_rank,
                status=UNKNOWN,
                path="",
                count=0,
                seconds=0.0,
            )
        count, status, path = int(state[0]), state[1], state[2]
        # one that failed ends soon after, and how it failed is what one wants to know
        if status == RUNNING and first is not None and first[0] == second[0]:
            status = DEAD
        # The beat's seconds belong to the state it was written in.
        same = int(second[1]) == count and second[2] == state[1]
        return RankState(
            rank=rank, branch=branch, branch_rank=branch_rank, status=status, path=path, count=count,
            seconds=float(second[3]) if same else 0.0,
        )  # fmt: skip


def _answer_within[T](seconds: float, question: Callable[[], T]) -> T | Exception | None:
    """What ``question`` returns, or the store's error; None if it has done neither in time."""
    answers: list[T | Exception] = []

    def ask() -> None:
        try:
            answers.append(question())
        except RuntimeError as error:
            answers.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None


def _log_and_flush(text: str) -> None:
    logger.critical("%s", text)
    for handler in logging.getLogger().handlers:
        handler.flush()
    sys.stdout.flush()
    sys.stderr.flush()
