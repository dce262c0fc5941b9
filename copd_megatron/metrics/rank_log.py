"""Logs of many ranks, readable as one: every line names its branch and rank, whichever file it ends up in.

    2026-01-31 12:00:00.123456 INFO    [text 0/2, rank 3] copd_megatron.branch.checkpoints: resumed from ...

Each rank appends to ``<run_dir>/logs/rank_00003.log``: no file is shared, so any shared file system will do.
``merged`` (``copd logs``) puts the lines of all ranks into the order of time.
"""

from __future__ import annotations

import heapq
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import IO

import yaml

from copd_megatron.errors import ConfigError

LOGS = "logs"
CONFIG = "config.yaml"
"""The resolved configuration in a run directory."""

_LINE = re.compile(
    r"(?P<time>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}) (?P<level>[A-Z]+) +"
    r"\[(?P<branch>\S+) (?P<branch_rank>\d+)/\d+, rank (?P<rank>\d+)\]"
)


@dataclass(frozen=True, kw_only=True)
class RankPlace:
    """Which process writes."""

    rank: int
    """Global rank."""
    branch: str
    branch_rank: int
    branch_size: int

    def __str__(self) -> str:
        return f"{self.branch} {self.branch_rank}/{self.branch_size}, rank {self.rank}"


class RankFormatter(logging.Formatter):
    """Time, level, branch and rank before every line, those of a traceback too."""

    def __init__(self, place: RankPlace) -> None:
        super().__init__("%(name)s: %(message)s")
        self._place = place

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created).strftime("%Y-%m-%d %H:%M:%S.%f")
        prefix = f"{when} {record.levelname:<7} [{self._place}] "
        return "\n".join(prefix + line for line in super().format(record).splitlines())


class _RankFile(logging.FileHandler):
    """A file whose failure, a full disk say, is told once: records still reach the other handlers."""

    _told = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Called while the exception is handled."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._told:
            self._told = True
            sys.stderr.write(f"{self.baseFilename}: lines are lost: {error.strerror or error}\n")


def start_logging(place: RankPlace, level: str, *, folder: Path | None, append: bool = True) -> None:
    """Sends the root logger's records to standard error (of ranks other than 0 only warnings and worse) and
    to this rank's file.

    Args:
        level: ``INFO`` or the like.
        folder: the run directory; None: no file.
        append: go on in the file that an earlier start of the run left.

    Raises:
        OSError: the file cannot be written.
    """
    formatter, number = RankFormatter(place), logging.getLevelNamesMapping()[level.upper()]
    shown = logging.StreamHandler(sys.stderr)
    shown.setLevel(number if place.rank == 0 else max(number, logging.WARNING))
    handlers: list[logging.Handler] = [shown]
    if folder is not None:
        path = log_file(folder, place.rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(_RankFile(path, mode="a" if append else "w", encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(formatter)
    logging.basicConfig(level=number, handlers=handlers)
    _keep_last_words(handlers[1:])


def _keep_last_words(files: Sequence[logging.Handler]) -> None:
    """The exception that ends this rank goes to its file too, beside the console, where it may be one of
    many."""
    usual = sys.excepthook

    def told(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        what = (__name__, logging.CRITICAL, __file__, 0, "this rank ends by an exception", (), None)
        record = logging.LogRecord(*what)
        record.exc_info = (kind, error, trace)
        for file in files if issubclass(kind, Exception) else ():
            file.handle(record)
        usual(kind, error, trace)

    sys.excepthook = told


def log_file(folder: Path, rank: int) -> Path:
    """Where a rank of a run directory logs."""
    return folder / LOGS / f"rank_{rank:05d}.log"


# ---- reading ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which lines to show; None: all."""

    branch: str | None = None
    rank: int | None = None
    level: str | None = None
    """This one and worse."""

    def takes(self, line: str) -> bool:
        match = _LINE.match(line)
        if match is None:
            return self == Selection()
        levels = logging.getLevelNamesMapping()
        return (
            (self.branch is None or match["branch"] == self.branch)
            and (self.rank is None or int(match["rank"]) == self.rank)
            and (self.level is None or levels.get(match["level"], 0) >= levels[self.level.upper()])
        )


def check_selection(folder: Path, selection: Selection) -> None:
    """Whether a run has the branch and the rank that are asked for.

    Raises:
        FileNotFoundError: the run directory has no logs.
        ConfigError: no rank of the run is in that branch, or has that number.
    """
    ranks = {int(path.stem.removeprefix("rank_")): path for path in _files(folder)}
    if selection.rank is not None and selection.rank not in ranks:
        raise ConfigError(f"--rank {selection.rank}: {folder} has logs of ranks {min(ranks)} to {max(ranks)}")
    if selection.branch is None:
        return
    named = [_branch_of(path) for path in ranks.values()]
    known = dict.fromkeys([*_configured_branches(folder), *(name for name in named if name)])
    if selection.branch not in known and (None not in named or (folder / CONFIG).exists()):
        raise ConfigError(f"--branch {selection.branch}: {folder} has the branches {', '.join(known)}")


def merged(folder: Path, selection: Selection | None = None) -> Iterator[str]:
    """All ranks' lines so far in the order of time, without line ends.

    Lines of one record stay together. Clocks of several nodes are taken as they are.

    Raises:
        FileNotFoundError: the run directory has no logs.
    """
    chosen = selection or Selection()
    paths = _files(folder)
    streams = [_timed(path, number) for number, path in enumerate(paths)]
    for _, _, line in heapq.merge(*streams, key=lambda item: item[:2]):
        if chosen.takes(line):
            yield line


def follow(
    folder: Path,
    selection: Selection | None = None,
    *,
    poll_seconds: float = 0.5,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[str]:
    """As ``merged``, and then what is written from now on, until ``stop``; ranks that appear later too.

    What comes within one poll is put in order; a rank whose lines arrive later than that is behind.
    """
    chosen = selection or Selection()
    opened: dict[Path, IO[str]] = {}
    rest: dict[Path, str] = {}
    when: dict[Path, str] = {}
    try:
        while True:
            last = stop()
            batch = []
            for number, path in enumerate(_files(folder)):
                if path not in opened:
                    opened[path] = path.open(encoding="utf-8", errors="replace")
                    rest[path] = when[path] = ""
                text = rest[path] + opened[path].read()
                *lines, rest[path] = text.split("\n")
                for line in lines:
                    when[path] = max(_time_of(line), when[path])
                    batch.append((when[path], number, line))
            for _, _, line in sorted(batch, key=lambda item: item[:2]):
                if chosen.takes(line):
                    yield line
            if last:
                return
            time.sleep(poll_seconds)
    finally:
        for file in opened.values():
            file.close()


def _files(folder: Path) -> list[Path]:
    paths = sorted((folder / LOGS).glob("rank_*.log"))
    if not paths:
        raise FileNotFoundError(
            f"{folder / LOGS} has no rank_*.log; give the directory of a run with logging.rank_files=true"
        )
    return paths


def _branch_of(path: Path) -> str | None:
    """The branch that a rank's lines name; None before its first line."""
    with path.open(encoding="utf-8", errors="replace") as file:
        return next((match["branch"] for line in file if (match := _LINE.match(line))), None)


def _configured_branches(folder: Path) -> list[str]:
    """The branches of the run's resolved configuration; none before it is written."""
    try:
        settings = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
        return list(settings["branches"])
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return []


def _timed(path: Path, number: int) -> Iterator[tuple[str, int, str]]:
    """Lines with their times; one without (printed by something else, torn) has that of the line before."""
    when = ""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            when = max(_time_of(line), when)
            yield when, number, line.rstrip("\n")


def _time_of(line: str) -> str:
    match = _LINE.match(line)
    return match["time"] if match else ""
