"""Where a rank's seconds went: every instant belongs to one part of the step, so the parts add up to it.

The watch reports each operation as it ends, inner ones before those around them. What an operation did
outside its inner operations counts as its own; what happened outside every operation is ``other``. A step
reaches from the figures of the step before to its own, so that the steps of a run add up to its time: what a
branch waits for at the end of a step, and the checkpoint after it, are the next step's.

Beside the seconds that passed, the clock counts the seconds that the loop's thread had a processor. On a CPU
they are what the work took; the rest is waiting for others, or for a processor on a busy machine.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Final

from copd_megatron.metrics.timeline import phase_of

PARTS: Final = (
    "generation",
    "grading",
    "scoring",
    "teaching",
    "exchange",
    "waiting",
    "update",
    "weight_sync",
    "evaluation",
    "checkpoint",
    "samples",
    "profile",
    "other",
)
"""What a step consists of, in the order of a stack. ``scoring``: the branch's own rows; ``teaching``: other
branches' rows, and its own under a privileged prompt; ``exchange``: packing and sending between branches;
``waiting``: for other ranks and branches; ``samples``, ``profile``: writing them."""

_PART_OF_PHASE: Final = {
    "sample": "generation",
    "grade": "grading",
    "score": "scoring",
    "route": "exchange",
    "wait": "waiting",
    "train": "update",
    "sync": "weight_sync",
    "save": "checkpoint",
}
"""The timeline's phases; the others are ``other``."""


def part_of(path: str) -> str:
    """The part, one of ``PARTS``, that the innermost operation of ``outer > inner`` belongs to."""
    names = path.split(" > ")
    phase = phase_of(names[-1])
    if phase == "score" and any(name.startswith("opd.score") for name in names):
        return "teaching"
    return _PART_OF_PHASE.get(phase, "other")


class StepClock:
    """One rank's clock. Made and used by the training loop's thread.

    >>> clock = StepClock()
    >>> with clock.part("evaluation"):
    ...     pass
    >>> seconds, parts = clock.lap()
    >>> abs(sum(parts.values()) - seconds) < 1e-9
    True
    """

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._details: defaultdict[str, float] = defaultdict(float)
        self._inner: dict[int, float] = {}
        """Seconds of the ended operations directly inside the open one of each depth."""
        self._inside_part = False
        self._processor: defaultdict[str, float] = defaultdict(float)
        self._noted = self._begin, time.thread_time()

    def operation(self, path: str, begin: float, end: float) -> None:
        """An operation has ended; ``path`` as the watch names it, times of ``time.monotonic``, in seconds."""
        if self._inside_part:
            return
        self._note_processor(part_of(path), end - begin, end)
        depth = path.count(" > ")
        inside = self._inner.pop(depth + 1, 0.0)
        self._seconds[part_of(path)] += end - begin - inside
        self._inner[depth] = self._inner.get(depth, 0.0) + end - begin

    def _note_processor(self, part: str, seconds: float, end: float) -> None:
        """Shares out the processor's time since the last call, which was ``end`` minus some seconds:
        ``seconds`` of that stretch belong to ``part``, the rest to ``other``."""
        (noted, used), now = self._noted, (end, time.thread_time())
        stretch, spent = now[0] - noted, now[1] - used
        share = min(seconds / stretch, 1.0) if stretch > 0 else 1.0
        self._processor[part] += spent * share
        self._processor["other"] += spent * (1 - share)
        self._noted = now

    @property
    def processor_seconds(self) -> dict[str, float]:
        """Seconds that the loop's thread had a processor since the last lap, by part."""
        rest = time.thread_time() - self._noted[1]
        return {**self._processor, "other": self._processor["other"] + rest}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """All that happens in the block belongs to one part, whatever its operations are called.

        Not inside an operation. A block within a block belongs to the outer one.
        """
        if self._inside_part:
            yield
            return
        self._inside_part, begin = True, time.monotonic()
        try:
            yield
        finally:
            self._inside_part = False
            end = time.monotonic()
            self._seconds[name] += end - begin
            self._note_processor(name, end - begin, end)

    def detail(self, name: str, seconds: float) -> None:
        """Adds to a figure below a part, such as ``generation_seconds/native``."""
        if not self._inside_part:
            self._details[name] += seconds

    @property
    def details(self) -> dict[str, float]:
        """Seconds by name since the last lap."""
        return dict(self._details)

    def restart(self) -> None:
        """The first step begins now."""
        self.lap()

    def lap(self) -> tuple[float, dict[str, float]]:
        """Ends a step and begins the next; outside every operation.

        Returns:
            The step's seconds, and those of each of ``PARTS``.
        """
        now = time.monotonic()
        seconds, self._begin = now - self._begin, now
        parts = dict(self._seconds)
        parts["other"] = parts.get("other", 0.0) + seconds - sum(parts.values())
        self._seconds.clear()
        self._processor.clear()
        self._noted = now, time.thread_time()
        self._details.clear()
        self._inner.clear()
        return seconds, {name: parts.get(name, 0.0) for name in PARTS}
