"""When a run has to stop early: signals and the wall-clock limit. Neither torch nor Megatron.

A scheduler announces the end of a job with SIGTERM or SIGUSR1, a terminal that is closed with SIGHUP, to some
processes or to all. Each process only takes note. The ranks compare notes at the end of every step, and so
save after the same one: the present one, or the next where branches do not wait for each other (in Phase I
with nothing to exchange).
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from types import FrameType, TracebackType
from typing import Final, Self

EXIT_PREEMPTED: Final = 75
"""Exit status of a run that saved and stopped before its end (EX_TEMPFAIL: start it again)."""

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_STARTED = time.time()


class StopSignals:
    """Takes note of SIGTERM, SIGUSR1 and SIGHUP instead of dying of them. Signals that the process ignores
    (nohup ignores SIGHUP) stay ignored. Use it in the main thread."""

    def __init__(self) -> None:
        self.received: str | None = None
        """Name of the first signal that came."""
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            # None: it was set outside Python and cannot be put back
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name


def deadline(
    limit_seconds: float | None, environment: Mapping[str, str] | None = None, started: float | None = None
) -> float | None:
    """When the job will be ended, in seconds since 1970; None: never.

    Args:
        limit_seconds: wall-clock limit from the start of this process; None: SLURM's, where there is one.
        environment: where ``SLURM_JOB_END_TIME`` is looked up; default the process's.
        started: when this process started; default the time this module was imported.
    """
    if limit_seconds is not None:
        return (_STARTED if started is None else started) + limit_seconds
    text = (os.environ if environment is None else environment).get("SLURM_JOB_END_TIME", "")
    return float(text) if text.isdigit() else None


def must_save_now(
    end: float | None, *, now: float, longest_step_seconds: float, reserve_seconds: float
) -> bool:
    """Whether another step might not leave ``reserve_seconds`` for saving before the job is ended."""
    return end is not None and now + longest_step_seconds + reserve_seconds >= end
