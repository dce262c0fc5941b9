"""What every rank did when: written by the ranks, merged into one Chrome trace that shows who waited.

A rank writes the start and end of each operation of its watch (``rollout.generate``, ``opd.receive rows
text<-image``, ...) to ``<run_dir>/timeline/rank_00003.jsonl``. ``copd timeline RUN_DIR`` merges the files of
all ranks into one trace. Each rank is a process row with three tracks: steps, phases (which do not overlap
and say what the time was spent on, waiting included) and operations (nested). Open it at
https://ui.perfetto.dev or chrome://tracing.

The cost is one list entry per operation, written once per step.
"""

from __future__ import annotations

import json
import logging
import socket
import statistics
import time
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from copd_megatron.errors import DataError
from copd_megatron.metrics.rank_log import RankPlace
from copd_megatron.metrics.writers import drop_torn_line
from copd_megatron.untrusted.json_text import lines_of, load_object, made
from copd_megatron.untrusted.regular_file import open_regular
from copd_megatron.untrusted.whole_file import append_whole, open_appending, write_whole

logger = logging.getLogger(__name__)

FOLDER = "timeline"
BEGIN = b'{"traceEvents": '
"""Of a trace."""

PHASES = ("sample", "grade", "route", "score", "wait", "train", "sync", "save", "load", "export", "other")

_PHASE_OF = (
    ("rollout.generate", "sample"),
    ("rewards.grade", "grade"),
    ("opd.score", "score"),
    ("policy.log_probs", "score"),
    ("opd.receive", "wait"),
    ("opd.wait", "wait"),
    ("opd.", "route"),
    ("rollout.gather", "wait"),
    ("rewards.gather", "wait"),
    ("barrier", "wait"),
    ("metrics", "wait"),
    ("evaluate.gather", "wait"),
    ("all_gather_objects", "wait"),
    ("branch_gather", "wait"),
    ("data.media", "wait"),
    ("update", "train"),
    ("policy.forward_backward", "train"),
    ("policy.optimizer_step", "train"),
    ("weight_sync", "sync"),
    ("checkpoint.agree", "wait"),
    ("checkpoint.counters", "wait"),
    ("checkpoint.gather", "wait"),
    ("checkpoint.load", "load"),
    ("checkpoint.verify", "load"),
    ("checkpoint.find", "load"),
    ("checkpoint", "save"),
    ("init_world", "load"),
    ("startup", "load"),
    ("rollout.load", "load"),
    ("export", "export"),
)
"""Phases by the beginning of an operation's name; the first match counts. Exchanges of small messages count
as waiting, because what takes time in them is the slowest rank."""


def phase_of(operation: str) -> str:
    """The phase, one of ``PHASES``, of an operation."""
    return next((phase for start, phase in _PHASE_OF if operation.startswith(start)), "other")


# ---- writing ---------------------------------------------------------------------------------------------


class TimelineWriter:
    """One rank's file. Times are in seconds of ``time.monotonic()``; a header relates them to Unix time.

    Every start of the run begins a new session in the file, so that restarts and the gaps between them are
    visible.
    """

    def __init__(self, run_dir: Path, place: RankPlace, *, aligned_at: float, append: bool = True) -> None:
        """
        Args:
            aligned_at: monotonic time at which this rank left a barrier of all ranks. It serves to compare
                the clocks of different nodes.
            append: continue the file of an earlier start of the run.

        Raises:
            OSError: the file cannot be written.
        """
        self._path = path = run_dir / FOLDER / f"rank_{place.rank:05d}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        if append and path.exists():
            drop_torn_line(path)
        self._file = open_appending(path, anew=not append)
        self._failed = False
        self._pending: list[dict[str, Any]] = [
            {
                "rank": place.rank,
                "branch": place.branch,
                "branch_rank": place.branch_rank,
                "host": socket.gethostname(),
                "unix_minus_monotonic": time.time() - time.monotonic(),
                "aligned_at": aligned_at,
            }
        ]
        self._flush()

    def operation(self, path: str, begin: float, end: float) -> None:
        """Records a finished operation.

        Args:
            path: the open operations from the outermost to this one, joined by `` > ``.
        """
        self._pending.append({"path": path, "begin": round(begin, 6), "end": round(end, 6)})

    def step(self, number: int, phase: str, begin: float, end: float) -> None:
        """Records a finished step (1, 2, ...) and writes what has accumulated."""
        self._pending.append({"step": number, "phase": phase, "begin": round(begin, 6), "end": round(end, 6)})
        self._flush()

    def close(self) -> None:
        """Writes the rest."""
        self._flush()
        self._file.close()

    def _flush(self) -> None:
        """Writes what has accumulated. On a full disk the rest of the timeline is lost, not the run."""
        if self._failed:
            return
        try:
            append_whole(
                self._file,
                "".join(json.dumps(entry, allow_nan=False) + "\n" for entry in self._pending).encode(),
            )
        except OSError as error:
            logger.warning(
                "%s: %s; the timeline ends here, the run goes on", self._path, error.strerror or error
            )
            self._failed = True
        self._pending.clear()


# ---- reading ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Span:
    """Something that lasted from ``begin`` to ``end``, in Unix seconds."""

    name: str
    begin: float
    end: float
    depth: int = 0
    number: int = 0
    """Of a step, from 1."""

    @property
    def seconds(self) -> float:
        return self.end - self.begin


@dataclass(kw_only=True)
class RankTimeline:
    """What one rank did in one session."""

    rank: int
    branch: str
    branch_rank: int
    host: str
    aligned_at: float
    """Unix time by this host's clock at which the rank left the barrier."""
    steps: list[Span] = field(default_factory=list)
    """Named ``step 3 (opd)``."""
    operations: list[Span] = field(default_factory=list)
    """In the order in which they ended: inner operations before those around them."""

    def phases(self) -> list[Span]:
        """What the time was spent on, as spans named by ``PHASES`` that do not overlap. The innermost
        operation counts.

        Time in a step outside any operation is ``other``. Time between steps is left out.
        """
        found = _exclusive(
            [
                *(Span(name="other", begin=s.begin, end=s.end, depth=-1) for s in self.steps),
                *(
                    Span(name=phase_of(o.name), begin=o.begin, end=o.end, depth=o.depth)
                    for o in self.operations
                ),
            ]
        )
        return [span for span in found if span.seconds > 0]

    def shifted(self, seconds: float) -> RankTimeline:
        """The same timeline, later by ``seconds``."""

        def move(spans: list[Span]) -> list[Span]:
            return [replace(span, begin=span.begin + seconds, end=span.end + seconds) for span in spans]

        return replace(
            self,
            aligned_at=self.aligned_at + seconds,
            steps=move(self.steps),
            operations=move(self.operations),
        )

    def between(self, first: int, last: int) -> RankTimeline:
        """Steps ``first`` to ``last`` and what began while they ran."""
        steps = [step for step in self.steps if first <= step.number <= last]
        low, high = min((s.begin for s in steps), default=0.0), max((s.end for s in steps), default=0.0)
        return replace(self, steps=steps, operations=[o for o in self.operations if low <= o.begin < high])


def read_timelines(run_dir: Path) -> list[RankTimeline]:
    """All sessions of all ranks, by rank and then by time, on one clock.

    Hosts' clocks are compared by the barrier that all ranks left together; ranks of one host share a clock.

    Raises:
        FileNotFoundError: the run directory has none.
        DataError: a file is not what ``TimelineWriter`` writes; names the line.
    """
    paths = sorted((run_dir / FOLDER).glob("rank_*.jsonl"))
    if not paths:
        raise FileNotFoundError(
            f"{run_dir / FOLDER} has no rank_*.jsonl; give the directory of a run with "
            "profiling.timeline=true"
        )
    found = [sessions for path in paths if (sessions := list(_read(path)))]
    if not found:
        raise DataError(f"{run_dir / FOLDER}: no rank has written a whole line yet; try again after a step")
    return [timeline for sessions in _aligned(found) for timeline in sessions]


def _read(path: Path) -> Iterator[RankTimeline]:
    current: RankTimeline | None = None
    offset = 0.0
    with open_regular(path) as file:
        for number, text, whole in lines_of(file, path):
            if not whole:
                break
            try:
                entry = load_object(text)
                header = made(_Header, entry) if "rank" in entry else None
                if header is None:
                    _add(current, entry, offset)
            except ValueError as error:
                raise DataError(
                    f"{path}, line {number} is not a line of a timeline ({error}): remove it, or the file"
                ) from error
            if header is not None:
                if current is not None:
                    yield current
                offset, current = _session(header)
    if current is not None:
        yield current


@dataclass(frozen=True, kw_only=True)
class _Header:
    """First line of a session."""

    rank: int
    branch: str
    branch_rank: int
    host: str
    unix_minus_monotonic: float
    aligned_at: float


@dataclass(frozen=True, kw_only=True)
class _StepLine:
    step: int
    phase: str
    begin: float
    end: float


@dataclass(frozen=True, kw_only=True)
class _OperationLine:
    path: str
    begin: float
    end: float


def _session(header: _Header) -> tuple[float, RankTimeline]:
    """Unix time minus monotonic time, and a session without steps."""
    offset = header.unix_minus_monotonic
    timeline = RankTimeline(
        rank=header.rank,
        branch=header.branch,
        branch_rank=header.branch_rank,
        host=header.host,
        aligned_at=header.aligned_at + offset,
    )
    return offset, timeline


def _add(timeline: RankTimeline | None, entry: Mapping[str, Any], offset: float) -> None:
    """Adds a step or an operation. Raises ValueError: the entry is neither, or no header came before it."""
    if timeline is None:
        raise ValueError("the header comes first")
    if "step" in entry:
        step = made(_StepLine, entry)
        name = f"step {step.step} ({step.phase})"
        begin, end = step.begin + offset, step.end + offset
        timeline.steps.append(Span(name=name, begin=begin, end=end, number=step.step))
    else:
        operation = made(_OperationLine, entry)
        *outer, name = operation.path.split(" > ")
        begin, end = operation.begin + offset, operation.end + offset
        timeline.operations.append(Span(name=name, begin=begin, end=end, depth=len(outer)))


def _aligned(ranks: Sequence[Sequence[RankTimeline]]) -> list[list[RankTimeline]]:
    """Each session, shifted by the difference between its host's clock and that of the first host."""
    moved: list[list[RankTimeline]] = [[] for _ in ranks]
    for number in range(max(map(len, ranks))):
        session = [(place, found[number]) for place, found in enumerate(ranks) if number < len(found)]
        by_host: dict[str, list[float]] = {}
        for _, timeline in session:
            by_host.setdefault(timeline.host, []).append(timeline.aligned_at)
        left = {host: statistics.median(times) for host, times in by_host.items()}
        reference = left[session[0][1].host]
        for place, timeline in session:
            moved[place].append(timeline.shifted(reference - left[timeline.host]))
    return moved


def _exclusive(spans: Sequence[Span]) -> list[Span]:
    """Cuts nested spans so that every instant belongs to the innermost one."""
    found: list[Span] = []
    stack: list[Span] = []
    cursor = 0.0

    def advance(to: float) -> None:
        nonlocal cursor
        if stack and to > cursor:
            found.append(Span(name=stack[-1].name, begin=cursor, end=to))
        cursor = max(cursor, to)

    for span in sorted(spans, key=lambda s: (s.begin, s.depth)):
        while stack and stack[-1].end <= span.begin:
            advance(stack[-1].end)
            stack.pop()
        advance(span.begin)
        cursor = max(cursor, span.begin)
        stack.append(span)
    while stack:
        advance(stack[-1].end)
        stack.pop()
    return found


# ---- the trace -------------------------------------------------------------------------------------------

_TRACKS = ("steps", "phases", "operations")


def chrome_trace(timelines: Sequence[RankTimeline]) -> dict[str, Any]:
    """The trace-event format of Perfetto and chrome://tracing. Times count from the first event."""
    spans = [s for t in timelines for s in (*t.steps, *t.operations)]
    zero = min((s.begin for s in spans), default=0.0)
    events: list[dict[str, Any]] = []
    for timeline in {t.rank: t for t in timelines}.values():
        name = f"{timeline.branch} rank {timeline.branch_rank}"
        about = [
            ("process_name", {"name": name}),
            ("process_labels", {"labels": f"rank {timeline.rank}, {timeline.host}"}),
            ("process_sort_index", {"sort_index": timeline.rank}),
        ]
        events += [{"ph": "M", "pid": timeline.rank, "name": key, "args": args} for key, args in about]
        for track, title in enumerate(_TRACKS):
            events.append(
                {
                    "ph": "M",
                    "pid": timeline.rank,
                    "tid": track,
                    "name": "thread_name",
                    "args": {"name": title},
                }
            )
    for timeline in timelines:
        for track, part in enumerate((timeline.steps, timeline.phases(), timeline.operations)):
            events += [
                {
                    "ph": "X",
                    "pid": timeline.rank,
                    "tid": track,
                    "name": span.name,
                    "cat": span.name if _TRACKS[track] == "phases" else phase_of(span.name),
                    "ts": round((span.begin - zero) * 1e6, 1),
                    "dur": round(span.seconds * 1e6, 1),
                }
                for span in part
            ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def seconds_by_phase(timelines: Sequence[RankTimeline]) -> dict[str, dict[str, float]]:
    """Branch to phase to seconds spent inside steps, averaged over the branch's ranks."""
    ranks: dict[str, set[int]] = {}
    sums: dict[str, dict[str, float]] = {}
    for timeline in timelines:
        ranks.setdefault(timeline.branch, set()).add(timeline.rank)
        row = sums.setdefault(timeline.branch, dict.fromkeys(PHASES, 0.0))
        begins = [step.begin for step in timeline.steps]
        for span in timeline.phases():
            place = bisect_right(begins, span.begin) - 1
            if place >= 0 and span.begin < timeline.steps[place].end:
                row[span.name] += span.seconds
    return {
        branch: {phase: seconds / len(ranks[branch]) for phase, seconds in row.items()}
        for branch, row in sums.items()
    }


def summary(timelines: Sequence[RankTimeline]) -> str:
    """``seconds_by_phase`` as aligned columns, with the share of time spent waiting."""
    table = seconds_by_phase(timelines)
    shown = [phase for phase in PHASES if any(row[phase] for row in table.values())]
    rows = [["seconds in steps", *shown, "waiting"]]
    for branch, row in table.items():
        total = sum(row.values())
        share = f"{row['wait'] / total:.0%}" if total else "-"
        rows.append([branch, *(f"{row[phase]:.2f}" for phase in shown), share])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def write_trace(
    run_dir: Path, target: Path | None = None, *, steps: tuple[int, int] | None = None
) -> tuple[Path, str]:
    """Merges a run's timelines into ``<run_dir>/timeline/trace.json`` (or ``target``).

    Args:
        steps: first and last step to show; None shows everything.

    Returns:
        The trace's path, and the summary.

    Raises:
        FileNotFoundError, ValueError: as ``read_timelines``; ValueError also if there are no such steps.
    """
    timelines = read_timelines(run_dir)
    if steps is not None:
        timelines = [timeline.between(*steps) for timeline in timelines]
        if not any(timeline.steps for timeline in timelines):
            raise ValueError(f"{run_dir / FOLDER} has no steps from {steps[0]} to {steps[1]}")
    path = target or run_dir / FOLDER / "trace.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(chrome_trace(timelines), allow_nan=False))
    return path, summary(timelines)
