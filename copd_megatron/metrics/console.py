"""What a person watching the run sees: one line per branch, redrawn on a terminal and logged elsewhere."""

from __future__ import annotations

import logging
import math
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

logger = logging.getLogger(__name__)

_OVERLAP = re.compile(r"copd/overlap@\d+/(?P<pair>.+)")
_STEPS_TIMED = 20
"""The remaining time is extrapolated from at most this many recent steps, since phases differ in length."""
_UNKNOWN = "-"


@dataclass(frozen=True, kw_only=True)
class BranchLine:
    """One branch at one step, ready to be shown. None means not measured in this step."""

    branch: str
    phase: str
    step: int
    total_steps: int
    reward: float | None
    entropy: float | None
    overlap: float | None
    """Mean over the pairs that include the branch."""
    tokens_per_second: float | None
    eta_seconds: float | None

    def cells(self) -> list[str]:
        """One string per column of ``COLUMNS``."""
        eta = _UNKNOWN if self.eta_seconds is None else str(timedelta(seconds=round(self.eta_seconds)))
        return [
            self.branch,
            self.phase,
            f"{self.step}/{self.total_steps}",
            _number(self.reward, "{:.3f}"),
            _number(self.entropy, "{:.3f}"),
            _number(self.overlap, "{:.3f}"),
            _number(self.tokens_per_second, "{:,.0f}"),
            eta,
        ]


COLUMNS = ("branch", "phase", "step", "reward", "entropy", "overlap", "tokens/s", "ETA")


class ConsoleView:
    """A ``writers.Writer`` for people. Create it on one rank only, and close it.

    On a terminal, rich redraws the lines in place, and log output that goes to standard output or error
    appears above them. Elsewhere, for example in a batch job's log, each branch gets one line per step.
    """

    def __init__(
        self,
        branches: Sequence[str],
        total_steps: int,
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            branches: in display order.
            total_steps: of the whole run, including steps before a resume.
            console: where to draw; None means standard error.
            clock: in seconds.
        """
        self._branches = tuple(branches)
        self._total_steps = total_steps
        self._clock = clock
        self._times: deque[tuple[int, float]] = deque(maxlen=_STEPS_TIMED + 1)
        self._console = Console(stderr=True) if console is None else console
        self._live: Live | None = None
        self._moved: list[tuple[logging.StreamHandler[Any], Any]] = []
        if self._console.is_terminal:
            self._start_live()

    def write(self, step: int, phase: str, metrics: Mapping[str, float]) -> None:
        """Shows one step. ``step`` counts the finished steps, including this one."""
        lines = self.lines(step, phase, metrics)
        if self._live is not None:
            self._live.update(_table(lines), refresh=True)
            return
        for line in lines:
            fields = zip(COLUMNS, line.cells(), strict=True)
            text = "  ".join(f"{name} {cell}" for name, cell in fields)
            logger.info("%s", text, extra={"branch": line.branch})

    def lines(self, step: int, phase: str, metrics: Mapping[str, float]) -> list[BranchLine]:
        """What ``write`` shows, one line per branch; also records when the step ended."""
        self._times.append((step, self._clock()))
        overlaps = {
            match["pair"]: value for name, value in metrics.items() if (match := _OVERLAP.fullmatch(name))
        }
        eta = self._eta_seconds()
        return [
            BranchLine(
                branch=branch,
                phase=phase,
                step=step,
                total_steps=self._total_steps,
                reward=metrics.get(f"{branch}/train/reward"),
                entropy=metrics.get(f"{branch}/train/entropy"),
                overlap=self._overlap_of(branch, overlaps),
                tokens_per_second=metrics.get(f"{branch}/perf/tokens_per_second"),
                eta_seconds=eta,
            )
            for branch in self._branches
        ]

    def finish(self, step: int, figures: Mapping[str, float]) -> None:
        """Shows nothing: the final table is printed."""

    def truncate_after(self, step: int) -> None:
        """Restarts the timing: steps before a resume say nothing about those after it."""
        self._times.clear()

    def close(self, *, failed: bool = False) -> None:
        """Leaves the last lines on the screen and restores the streams of log handlers."""
        for handler, stream in self._moved:
            handler.setStream(stream)
        self._moved.clear()
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _start_live(self) -> None:
        before = (sys.stdout, sys.stderr)
        self._live = Live(_table([]), console=self._console, auto_refresh=False)
        self._live.start()
        # rich redirects sys.stdout and sys.stderr, but existing handlers hold the original streams and would
        # write over the redrawn lines
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream in before:
                self._moved.append((handler, handler.stream))
                handler.setStream(sys.stderr)

    def _overlap_of(self, branch: str, overlaps: Mapping[str, float]) -> float | None:
        # names of branches have no "-"; the other branch may be a frozen teacher, which has no line
        values = [value for pair, value in overlaps.items() if branch in pair.split("-")]
        return sum(values) / len(values) if values else None

    def _eta_seconds(self) -> float | None:
        (first_step, first_time), (last_step, last_time) = self._times[0], self._times[-1]
        if last_step <= first_step:
            return None
        seconds_per_step = (last_time - first_time) / (last_step - first_step)
        return max(0.0, seconds_per_step * (self._total_steps - last_step))


def _table(lines: Sequence[BranchLine]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in ("branch", "phase") else "right", no_wrap=True)
    for line in lines:
        table.add_row(*line.cells())
    return table


def _number(value: float | None, pattern: str) -> str:
    if value is None:
        return _UNKNOWN
    return pattern.format(value) if math.isfinite(value) else str(value)
