"""Who waits for whom, given what every rank is doing (``rank_table``). Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

JOB_ENDS = "watch: the job ends: "
"""Before the reason, in the line that a rank logs when another one has found the job hopeless."""
_MAX_NAMED = 8
RUNNING, FAILED, CLOSED = "running", "failed", "closed"
EXITED, DEAD, UNKNOWN = "exited", "dead", "unknown"
"""Values of ``RankState.status``."""
_GONE_ORDER = {DEAD: 0, EXITED: 1, FAILED: 2, UNKNOWN: 3, RUNNING: 4, CLOSED: 5}


@dataclass(frozen=True, kw_only=True)
class RankState:
    """What one rank was doing when the table was read."""

    rank: int
    """Global rank."""
    branch: str
    branch_rank: int
    status: str
    """``running``, ``failed`` (an exception left an operation), ``closed`` (ended in good order), ``exited``
    (ended without closing), ``dead`` (no heartbeat: killed, or stuck in native code that never lets Python
    run), ``unknown`` (never reported)."""
    path: str
    """Open operations, outermost first, joined by `` > ``; empty between operations."""
    count: int
    """Operations entered so far. Ranks of one branch run the same ones, so one with a lower count is
    behind."""
    seconds: float
    """Since it last entered or left an operation."""

    @property
    def label(self) -> str:
        return f"{self.branch} rank {self.branch_rank}"

    @property
    def activity(self) -> str:
        """``in rollout.generate for 613 s``, or what the status says unless it is ``running``."""
        where = f"in {self.path}" if self.path else "between operations"
        if self.status == UNKNOWN:
            return "never reported"
        if self.status == CLOSED:
            return "finished"
        if self.status == DEAD:
            return f"dead or frozen: no heartbeat, last seen {where}"
        if self.status == EXITED:
            return f"exited, last seen {where}"
        if self.status == FAILED:
            return f"failed {where}"
        return f"{where} for {self.seconds:.0f} s"


def waited_for(
    mine: RankState, table: Sequence[RankState], ranks: Iterable[int] | None = None
) -> list[RankState]:
    """Ranks that keep ``mine`` waiting, the likeliest culprit first.

    A rank that takes part in the operation keeps the others waiting if it is gone, is in another operation,
    or, within one branch, has entered fewer operations. Ranks that are gone come first, then those that have
    been in their operation the longest.

    Args:
        ranks: global ranks that take part; None: all.
    """
    participants = None if ranks is None else set(ranks)
    waiting = []
    for state in table:
        if state.rank == mine.rank or (participants is not None and state.rank not in participants):
            continue
        behind = state.branch == mine.branch and state.count < mine.count
        if state.status != RUNNING or state.path != mine.path or behind:
            waiting.append(state)
    return sorted(waiting, key=lambda s: (_GONE_ORDER[s.status], -s.seconds, s.rank))


def format_report(mine: RankState, table: Sequence[RankState], ranks: Iterable[int] | None = None) -> str:
    """Who waits for whom, as text: the culprits, the ranks of this branch that are behind, then all ranks."""
    culprits = waited_for(mine, table, ranks)
    lines = []
    if culprits:
        named = [f"{s.label} (global rank {s.rank}, {s.activity})" for s in culprits[:_MAX_NAMED]]
        if len(culprits) > _MAX_NAMED:
            named.append(f"and {len(culprits) - _MAX_NAMED} more")
        lines.append("waiting for: " + "; ".join(named))
    elif ranks is not None and set(ranks) <= {mine.rank}:
        lines.append(
            "waiting for: nobody; no other rank takes part in this, so this one is stuck by itself: its "
            "stacks show where"
        )
    else:
        lines.append(
            "waiting for: nobody; every rank taking part is in the same operation, so look for a broken "
            "connection between them, or for collectives that do not match"
        )
    for word, ranks_there in (
        ("behind", [s for s in table if s.branch == mine.branch and s.count < mine.count]),
        ("ahead", [s for s in table if s.branch == mine.branch and s.count > mine.count]),
    ):
        if ranks_there:
            steps = [f"rank {s.branch_rank} at operation {s.count}" for s in ranks_there[:_MAX_NAMED]]
            lines.append(f"{word} in branch {mine.branch}: {', '.join(steps)} (this rank: {mine.count})")
    lines.append("all ranks:")
    lines += [f"  {line}" for line in _grouped(table)]
    return "\n".join(lines)


def _grouped(table: Sequence[RankState]) -> list[str]:
    """One line for each set of ranks of a branch that do the same."""
    groups: dict[tuple[str, str, str], list[RankState]] = {}
    for state in table:
        groups.setdefault((state.branch, state.status, state.path), []).append(state)
    lines = []
    for (branch, _, _), states in groups.items():
        numbers = _ranges([s.branch_rank for s in states])
        slowest = max(states, key=lambda s: s.seconds)
        noun = "rank" if len(states) == 1 else "ranks"
        lines.append(
            f"{branch} {noun} {numbers} (global {_ranges([s.rank for s in states])}): {slowest.activity}"
        )
    return lines


def _ranges(numbers: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2, 5``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
