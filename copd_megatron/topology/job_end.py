"""How the ranks of a job agree that it must end, and what they leave behind.

The store's key ``watch/end`` holds the verdict once there is one. Every rank looks for it at each heartbeat.
Two things bring one about. A rank that has been in one operation for too long, and still is when it has found
out who waits for whom, ends the job as stuck: every rank writes a report with its stacks. A rank that failed
for a reason that a restart cannot mend ends it as hopeless: every rank exits with ``EXIT_HOPELESS``, so that
the launcher, whichever rank's status it sees, does not start the job again.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from torch.distributed import Store

from copd_megatron.errors import EXIT_HOPELESS
from copd_megatron.topology.rank_table import read_table
from copd_megatron.topology.store import text_of
from copd_megatron.topology.who_waits import JOB_ENDS, RankState, format_report
from copd_megatron.untrusted.visible import visible
from copd_megatron.untrusted.whole_file import replacing

logger = logging.getLogger(__name__)

EXIT_STUCK: Final = 86
"""Exit status of a process in a job that the watch ended."""

_END = "watch/end"
_SUSPECTING = "watch/suspecting"
_HOPELESS, _STUCK = "hopeless", "stuck"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Why the job ends, as one rank decided for all."""

    hopeless: bool
    """A restart cannot mend it; else some rank is stuck."""
    reason: str

    def __str__(self) -> str:
        return f"{_HOPELESS if self.hopeless else _STUCK}\t{self.reason}"

    @classmethod
    def parse(cls, value: bytes) -> Verdict:
        """The inverse of ``str``, of what the store holds."""
        kind, _, reason = value.partition(b"\t")
        return cls(hopeless=kind == _HOPELESS.encode(), reason=text_of(reason))

    @classmethod
    def read(cls, store: Store) -> Verdict | None:
        """The job's verdict, if there is one. Raises RuntimeError if the store does not answer."""
        return cls.parse(store.get(_END)) if store.check([_END]) else None

    def pronounce(self, store: Store) -> Verdict:
        """Ends the job by this verdict, or by the one that came before it, which is returned."""
        return Verdict.parse(store.compare_set(_END, "", str(self)))


@dataclass(frozen=True, kw_only=True)
class Suspect:
    """This rank in an operation that may be stuck."""

    state: RankState
    """When it was suspected."""
    limit_seconds: float
    """Infinite between operations."""
    ranks: tuple[int, ...] | None
    """Global ranks that take part in the operation; None: everybody may."""
    moved_on: Callable[[], bool]
    """Whether the operation has ended meanwhile."""

    @property
    def headline(self) -> str:
        state = self.state
        where = f"operation {state.path!r}" if state.path else "no operation"
        limit = f" (limit {self.limit_seconds:.0f} s)" if self.limit_seconds != float("inf") else ""
        return (
            f"watch: {state.label} (global rank {state.rank}) in {where} without progress for "
            f"{state.seconds:.0f} s{limit}"
        )


class JobEnd:
    """Ends this process together with the rest of the job.

    Args:
        store: the job's store; every use clones it, since a client that blocks in one thread blocks the other
            users.
        places: branch and branch rank of every global rank.
        report_dir: where reports and stacks are written; None: to standard error only.
        hosts_store: this process serves the store, so it must not be the first to go.
        store_rank: global rank that serves the store; None: the launcher does.
    """

    def __init__(
        self,
        store: Store,
        places: Mapping[int, tuple[str, int]],
        *,
        heartbeat_seconds: float,
        report_dir: Path | None,
        hosts_store: bool,
        store_rank: int | None,
    ) -> None:
        self._store, self._places, self._heartbeat = store, places, heartbeat_seconds
        self._report_dir, self._hosts_store, self._store_rank = report_dir, hosts_store, store_rank

    def hopeless(self, reason: str) -> None:
        """Ends the job for the other ranks: starting it again cannot help. Returns when they have had the
        time to learn of it, and to end before their collectives with this one fail."""
        answer = _answer_within(5.0, lambda: Verdict(hopeless=True, reason=reason).pronounce(self._clone()))
        if isinstance(answer, Verdict):
            time.sleep(2.5 * self._heartbeat)

    def obey(self, verdict: Verdict) -> None:
        """Ends this process because the job has been found hopeless. Never returns."""
        _log_in_time(f"{JOB_ENDS}{verdict.reason}; starting it again as it is cannot help")
        os._exit(EXIT_HOPELESS)

    def stuck(self, suspect: Suspect) -> None:
        """Ends this process, and the job, with reports and stacks. Returns only if the operation has ended
        after all."""
        patience = 12 * self._heartbeat + 8.0
        answer = _answer_within(patience, lambda: self._agree(suspect))
        if isinstance(answer, _Agreed):
            if answer.verdict is None:
                return
            if answer.verdict.hopeless:
                self.obey(answer.verdict)
            speaks, report = answer.report is not None, answer.report
            report = report or f"ended by another rank's report: {answer.verdict.reason}"
        elif suspect.moved_on():
            return
        else:
            speaks, report = True, self._silent_store(patience, answer)
        self._leave_report(suspect.state.label, suspect.state.rank, f"{suspect.headline}\n{report}", speaks)
        if isinstance(answer, _Agreed):
            seconds = 4 * self._heartbeat + 2.0
            _answer_within(seconds + 1.0, lambda: self._wait_for_reports(seconds))
        if self._hosts_store:
            time.sleep(1.0)
        os._exit(EXIT_STUCK)

    def _clone(self) -> Store:
        # torch's type stubs lack Store.clone
        clone: Store = self._store.clone()  # type: ignore[attr-defined]
        return clone

    # ---- agreeing --------------------------------------------------------------------------------------

    def _agree(self, suspect: Suspect) -> _Agreed:
        """Decides with the other ranks whether the job ends.

        Finding out who waits for whom takes a while, in which the operation may end: whoever finds out looks
        again before ending the job. Only one rank at a time does, as a thousand would swamp the store; the
        others wait for it, and take its place if it falls silent.
        """
        store, me = self._clone(), str(suspect.state.rank)
        before = ""
        while True:
            if (verdict := Verdict.read(store)) is not None:
                time.sleep(3 * self._heartbeat)  # the one who speaks for all reports first
                return _Agreed(verdict=verdict)
            if suspect.moved_on():
                return _Agreed()
            finder = text_of(store.compare_set(_SUSPECTING, before, me))
            if finder == me:
                return self._find_out(store, suspect)
            before = self._wait_for(store, suspect, finder)

    def _find_out(self, store: Store, suspect: Suspect) -> _Agreed:
        table = read_table(store, self._places, self._heartbeat, suspect.state)
        if suspect.moved_on():
            store.delete_key(_SUSPECTING)
            return _Agreed()
        verdict = Verdict(hopeless=False, reason=suspect.headline)
        agreed = verdict.pronounce(store)
        mine = agreed == Verdict.parse(str(verdict).encode())
        report = format_report(suspect.state, table, suspect.ranks) if mine else None
        return _Agreed(verdict=agreed, report=report)

    def _wait_for(self, store: Store, suspect: Suspect, finder: str) -> str:
        """Waits until ``finder`` has ended the job or left it alone, or this rank's operation has ended; the
        value of the key that whoever finds out next has to replace."""
        deadline = time.monotonic() + 4 * self._heartbeat + 2.0
        while time.monotonic() < deadline and not suspect.moved_on():
            if store.check([_END]):
                return ""
            if not store.check([_SUSPECTING]):
                return ""
            time.sleep(self._heartbeat / 4)
        return finder

    # ---- leaving ---------------------------------------------------------------------------------------

    def _silent_store(self, seconds: float, error: Exception | None) -> str:
        """What a report says when the store does not answer."""
        if error is not None:
            return f"the job's store does not answer ({error}): its host has ended"
        branch, i = self._places.get(-1 if self._store_rank is None else self._store_rank, ("", 0))
        host = f"{branch} rank {i} (global rank {self._store_rank})" if branch else "the launcher"
        return f"waiting for: {host}, frozen: it serves the job's store, silent for {seconds:.0f} s"

    def _leave_report(self, label: str, rank: int, text: str, speaks: bool) -> None:
        """Logs the report, and writes the stacks of all threads to the report directory; to standard error
        too if this rank ``speaks`` for all, or there is no directory."""
        to_stderr = speaks or self._report_dir is None
        if self._report_dir is not None:
            path = self._report_dir / f"stuck_rank_{rank:05d}.txt"
            try:
                self._report_dir.mkdir(parents=True, exist_ok=True)
                with replacing(path) as file:  # opens nothing that is there: a FIFO would wait for ever
                    file.write(f"{text}\n\nstacks:\n".encode("utf-8", "replace"))
                    file.flush()
                    faulthandler.dump_traceback(file=file, all_threads=True)
                text += f"\nstacks of every rank: {self._report_dir}/stuck_rank_*.txt"
            except OSError as error:
                text += f"\n(could not write {path}: {error})"
                to_stderr = True
        _log_in_time(text)
        if to_stderr:
            os.write(2, f"stacks of {label}:\n".encode())
            faulthandler.dump_traceback(file=2, all_threads=True)

    def _wait_for_reports(self, seconds: float) -> None:
        """Lets every rank write its report before launchers notice the first exit and kill the rest."""
        deadline = time.monotonic() + seconds
        store = self._clone()
        reported = store.add("watch/reported", 1)
        while reported < len(self._places) and time.monotonic() < deadline:
            time.sleep(self._heartbeat / 4)
            reported = store.add("watch/reported", 0)


@dataclass(frozen=True, kw_only=True)
class _Agreed:
    """What the ranks decided about a suspect."""

    verdict: Verdict | None = None
    """None: its operation has ended, and the job goes on."""
    report: str | None = None
    """What this rank says for all; None: another one does."""


def _answer_within[T](seconds: float, question: Callable[[], T]) -> T | Exception | None:
    """What ``question`` returns, or the store's error; None if it has done neither in time."""
    answers: list[T | Exception] = []

    def ask() -> None:
        try:
            answers.append(question())
        except (RuntimeError, ValueError, IndexError) as error:  # no answer, or one that is none of ours
            answers.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None


def _log_in_time(text: str) -> None:
    """Logs the last words of a process. A stuck thread may hold a lock of logging, which must not stop the
    exit."""
    log = threading.Thread(target=_log_and_flush, args=(text,), daemon=True)
    log.start()
    log.join(timeout=5.0)
    if log.is_alive():
        os.write(2, f"{visible(text)}\n".encode())


def _log_and_flush(text: str) -> None:
    logger.critical("%s", text)
    for handler in logging.getLogger().handlers:
        handler.flush()
    sys.stdout.flush()
    sys.stderr.flush()
