"""Where metrics go: always to ``metrics.jsonl``, and to TensorBoard on request. One process writes."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from copd_megatron.errors import DataError, RunStorageError
from copd_megatron.untrusted.json_text import kind_of, lines_of, load_object, loadable
from copd_megatron.untrusted.regular_file import open_regular
from copd_megatron.untrusted.whole_file import append_whole, open_appending, replacing

logger = logging.getLogger(__name__)

_RESERVED = ("step", "phase")


class Writer(Protocol):
    """Receives the reduced metrics of each step."""

    def write(self, step: int, phase: str, metrics: Mapping[str, float]) -> None:
        """Records one step."""

    def finish(self, step: int, figures: Mapping[str, float]) -> None:
        """Records figures of the whole run, of its final table, when ``step``, the last one, is done."""

    def truncate_after(self, step: int) -> None:
        """Removes steps after ``step``: a run that resumes from a checkpoint will write them again."""

    def close(self, *, failed: bool = False) -> None:
        """Flushes and closes. ``failed`` says that an error ends the run."""


class JsonlWriter:
    """One JSON object per line: ``{"step": 3, "phase": "rlvr", "text/train/reward": 0.41, ...}``.

    A line is written at once and as a whole, so a run that dies leaves at most one incomplete line, which is
    removed when the file is opened again. Values that JSON lacks (NaN, infinities) become ``null``.

    A run whose metrics cannot be written ends: a resumed run must be able to show every step it has made.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """
        Args:
            path: usually ``<run_dir>/metrics.jsonl``. Continued if it exists, else created with its folders.

        Raises:
            OSError: the file cannot be written.
        """
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._warned: set[str] = set()
        if self.path.exists():
            drop_torn_line(self.path)
        self._file = open_appending(self.path)

    def write(self, step: int, phase: str, metrics: Mapping[str, float]) -> None:
        """Appends one line.

        Raises:
            ValueError: a metric is named ``step`` or ``phase``.
            RunStorageError: the line cannot be written; the file is as it was before.
        """
        record: dict[str, Any] = {"step": step, "phase": phase}
        for name, value in metrics.items():
            if name in _RESERVED:
                raise ValueError(f"a metric cannot be named {name!r}: the line's own field has that name")
            record[name] = self._jsonable(name, float(value), step)
        self._append(json.dumps(record, allow_nan=False).encode() + b"\n", step)

    def finish(self, step: int, figures: Mapping[str, float]) -> None:
        """Writes nothing: a line is a step, and ``evaluation.json`` beside it holds the final table."""

    def truncate_after(self, step: int) -> None:
        """Removes the lines of later steps. Replaces the file atomically, so a crash leaves the old or the
        new one.

        Raises:
            DataError: a line is not a JSON object with an integer step; names the line.
        """
        with replacing(self.path, durable=True) as kept:
            for line, line_step in self._lines():
                if line_step <= step:
                    kept.write(line)
        self._file.close()
        self._file = open_appending(self.path)

    def close(self, *, failed: bool = False) -> None:
        """Closes the file."""
        self._file.close()

    def _append(self, line: bytes, step: int) -> None:
        try:
            append_whole(self._file, line)
            os.stat(self.path)  # a file that has been removed takes what nobody will ever read
        except OSError as error:
            raise RunStorageError(
                f"{self.path}: the metrics of step {step} cannot be written ({error.strerror or error}); "
                "free some space or restore the folder, and start the same command again: it continues from "
                "the newest checkpoint"
            ) from error

    def _jsonable(self, name: str, value: float, step: int) -> float | None:
        if (kept := loadable(value)) is not None:
            return float(kept)
        if name not in self._warned:
            self._warned.add(name)
            logger.warning(
                "metric %s is %s at step %d: written as null now and whenever this happens again",
                name,
                value,
                step,
            )
        return None

    def _lines(self) -> Iterator[tuple[bytes, int]]:
        with open_regular(self.path) as file:
            for number, text, _ in lines_of(file, self.path):
                try:
                    step = load_object(text).get("step")
                    if type(step) is not int:
                        raise ValueError(f"step is {kind_of(step)}, expected an integer")
                except ValueError as error:
                    raise DataError(
                        f"{self.path}, line {number} is not a metrics line: {error}; "
                        "remove the line, or move the file away"
                    ) from error
                yield text, step


def drop_torn_line(path: Path) -> None:
    """Truncates a file of lines after its last newline: a run that died may have left half a line."""
    with open_appending(path) as file:
        end = file.seek(0, os.SEEK_END)
        keep, position = 0, end
        while position > 0:
            start = max(0, position - 65536)
            file.seek(start)
            newline = file.read(position - start).rfind(b"\n")
            if newline >= 0:
                keep = start + newline + 1
                break
            position = start
        if keep < end:
            logger.warning("%s ended in an incomplete line of %d bytes, which was removed", path, end - keep)
            file.truncate(keep)


class TensorBoardWriter:
    """Writes the same metrics as TensorBoard scalars, without values that are not finite."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        """
        Args:
            directory: usually ``<run_dir>/tensorboard``.

        Raises:
            ImportError: the ``tensorboard`` package is missing.
        """
        # imported here, so that only runs that use TensorBoard need it
        from torch.utils.tensorboard import SummaryWriter

        self._make = SummaryWriter
        self._directory = os.fspath(directory)
        self._writer = SummaryWriter(self._directory)

    def write(self, step: int, phase: str, metrics: Mapping[str, float]) -> None:
        """Records one step. ``phase`` is not a number, so only ``metrics.jsonl`` has it."""
        for name, value in metrics.items():
            if math.isfinite(value):
                self._writer.add_scalar(name, value, global_step=step)
        self._writer.flush()

    def finish(self, step: int, figures: Mapping[str, float]) -> None:
        """Adds a scalar per figure, at the last step."""
        self.write(step, "", figures)

    def truncate_after(self, step: int) -> None:
        """Starts an events file that makes TensorBoard hide what earlier files hold after ``step``."""
        self._writer.close()
        self._writer = self._make(self._directory, purge_step=step + 1)

    def close(self, *, failed: bool = False) -> None:
        """Flushes and closes the events file."""
        self._writer.close()
