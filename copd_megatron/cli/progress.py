"""How far a command has come: on a terminal as a line or a bar, in a log as a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self, TextIO

from copd_megatron.cli.output import say

_SECONDS_BETWEEN_UPDATES = 0.2
_SECONDS_BETWEEN_LINES = 10.0


class ProgressLine:
    """Counts tensors and bytes; shows them on a terminal, and nothing elsewhere."""

    def __init__(self, stream: TextIO | None = None) -> None:
        """
        Args:
            stream: None: standard error.
        """
        self._stream = sys.stderr if stream is None else stream
        self._shows = self._stream.isatty()
        self._begin = time.perf_counter()
        self._last = 0.0
        self.num_tensors = 0
        self.num_bytes = 0

    def __call__(self, name: str, num_bytes: int) -> None:
        """One more tensor is done."""
        self.num_tensors += 1
        self.num_bytes += num_bytes
        now = time.perf_counter()
        if self._shows and now - self._last >= _SECONDS_BETWEEN_UPDATES:
            self._last = now
            self._stream.write(f"\r\033[K{self.summary()}  {name}")
            self._stream.flush()

    def summary(self) -> str:
        """``398 tensors, 8.04 GB in 6.1 s (1.32 GB/s)``"""
        seconds = max(time.perf_counter() - self._begin, 1e-9)
        size = self.num_bytes / 1e9
        return f"{self.num_tensors} tensors, {size:.3g} GB in {seconds:.1f} s ({size / seconds:.2g} GB/s)"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shows:
            self._stream.write("\r\033[K")
            self._stream.flush()


class StepLines:
    """A line every ten seconds, and for the first and the last step; before the first, for the data that it
    needs, which is no measure of the remaining time."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._printed = float("-inf")
        self._first_done: float | None = None
        self._first_drawn: tuple[float, int] | None = None

    def prepared(self, done: int, total: int) -> None:
        """So much of the data is there. The first call tells no speed: before it, packages were imported."""
        now = time.monotonic()
        since, before = self._first_drawn = self._first_drawn or (now, done)
        if now - max(self._printed, self._started) < _SECONDS_BETWEEN_LINES:
            return
        self._printed = now
        line = f"  task {done} of {total} drawn; {now - self._started:.0f} s"
        if done > before:
            line += f", {(now - since) / (done - before) * (total - done):.0f} s to go"
        say(line, flush=True)

    def __call__(self, step: int, num_steps: int, loss: float) -> None:
        """Step number ``step``, counted from 0, is done."""
        now = time.monotonic()
        if self._first_done is None:
            self._first_done = now
        if now - self._printed < _SECONDS_BETWEEN_LINES and step + 1 < num_steps:
            return
        self._printed = now
        line = f"  step {step + 1} of {num_steps}: loss {loss:.3f}; {now - self._started:.0f} s"
        if step:
            remaining = (now - self._first_done) / step * (num_steps - step - 1)
            line += f", {remaining:.0f} s to go"
        say(line, flush=True)


@contextmanager
def byte_bar(title: str, *, shown: bool = True) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on the terminal, moved by calling what this yields with bytes done and bytes in all; None where
    there is no terminal or it is not ``shown``."""
    if not shown or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        "{task.description}",
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
