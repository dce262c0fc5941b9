"""Logs of many ranks that can be read as one: every line in a file names its branch and rank.

    2026-01-31 12:00:00.123456 INFO    [text 0/2, rank 3] copd_megatron.branch.checkpoints: resumed from ...

Each rank appends to a file of its own, ``<run_dir>/logs/rank_00003.log``, so any shared file system will do.
``merged`` (``copd logs``) sorts the lines of all ranks by time. The console gets a shorter form:

    01-31 12:00:00 [text] resumed from ...
"""

from __future__ import annotations

import heapq
import io
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType

import yaml

from copd_megatron.errors import ConfigError, is_hopeless
from copd_megatron.untrusted.regular_file import open_regular, read_regular
from copd_megatron.untrusted.visible import show_traceback, visible
from copd_megatron.untrusted.whole_file import open_appending
from copd_megatron.untrusted.yaml_text import load_yaml

LOGS = "logs"
CONFIG = "config.yaml"
"""The resolved configuration in a run directory."""

_MAX_CONFIG_BYTES = 16 << 20
_MAX_LINE_BYTES = 1 << 20
"""Of what is handled as one line; an endless one comes in parts."""
_PIECE_BYTES = 1 << 14
"""Read of a rank's file at once: there may be thousands."""
_LINE = re.compile(
    r"(?P<time>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}) (?P<level>[A-Z]+) +"
    r"\[(?P<branch>[^\s,]+)( \d+/\d+)?, rank (?P<rank>\d+)\]"
)
_NAME = re.compile(r"rank_\d{1,9}\.log", re.ASCII)
TIME_FORMAT = "%Y-%m-%d %H:%M:%S.%f"
"""Of the time at the beginning of a line in a file."""
_OURS = "copd_megatron"
ENDED_BY = "this rank ends by "
"""Before the exception that ended a rank, in the first line of its last record."""


@dataclass(frozen=True, kw_only=True)
class RankPlace:
    """The process that writes a log."""

    rank: int
    """Global rank."""
    branch: str
    branch_rank: int
    branch_size: int

    def __str__(self) -> str:
        return f"{self.branch} {self.branch_rank}/{self.branch_size}, rank {self.rank}"


def _subject(record: logging.LogRecord) -> str | None:
    """The branch that a record is about, if it is not the writer's own: ``extra={"branch": name}``."""
    return getattr(record, "branch", None)


class RankFormatter(logging.Formatter):
    """Puts time, level, branch and rank before every line, including those of a traceback."""

    def __init__(self, place: RankPlace) -> None:
        super().__init__("%(name)s: %(message)s")
        self._place = place

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created).strftime(TIME_FORMAT)
        subject = _subject(record)
        place = self._place if subject is None else f"{subject}, rank {self._place.rank}"
        prefix = f"{when} {record.levelname:<7} [{place}] "
        return "\n".join(prefix + line for line in visible(super().format(record)).splitlines())


class ConsoleFormatter(logging.Formatter):
    """A short prefix for people: time and branch. Other levels than INFO also show the level and the rank,
    and lines of other packages their logger."""

    def __init__(self, place: RankPlace) -> None:
        super().__init__("%(message)s")
        self._place = place

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created).strftime("%m-%d %H:%M:%S")
        prefix = f"{when} [{_subject(record) or self._place.branch}] "
        if record.levelno != logging.INFO:
            prefix = f"{when} {record.levelname} [{self._place}] "
        if record.name.partition(".")[0] != _OURS:
            prefix += f"{record.name}: "
        return "\n".join(prefix + line for line in visible(super().format(record)).splitlines())


class _RankFile(logging.FileHandler):
    """A file whose failure (a full disk, for example) is reported once; records still reach other
    handlers. A link, a FIFO or a device in its place is refused: a received run directory may hold one."""

    _told = False

    def _open(self) -> io.TextIOWrapper:
        file = open_appending(self.baseFilename, anew=self.mode == "w")
        return io.TextIOWrapper(io.BufferedWriter(file), encoding=self.encoding)

    def handleError(self, record: logging.LogRecord) -> None:
        """Called while the exception is handled."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._told:
            self._told = True
            sys.stderr.write(f"{self.baseFilename}: lines are lost: {error.strerror or error}\n")


def start_logging(place: RankPlace, level: str, *, folder: Path | None, append: bool = True) -> None:
    """Sends the root logger's records to standard error (only warnings and worse, except on rank 0) and to
    this rank's file.

    Args:
        level: ``INFO`` or another level's name.
        folder: the run directory; None writes no file.
        append: continue the file of an earlier start of the run.

    Raises:
        OSError: the file cannot be written, or is a link or no regular file.
    """
    number = logging.getLevelNamesMapping()[level.upper()]
    shown = logging.StreamHandler(sys.stderr)
    shown.setLevel(number if place.rank == 0 else max(number, logging.WARNING))
    shown.setFormatter(ConsoleFormatter(place))
    files: list[logging.Handler] = []
    if folder is not None:
        path = log_file(folder, place.rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        files.append(_RankFile(path, mode="a" if append else "w", encoding="utf-8"))
        files[0].setFormatter(RankFormatter(place))
    logging.basicConfig(level=number, handlers=[shown, *files])
    _keep_last_words(files, shown)


def _keep_last_words(files: Sequence[logging.Handler], shown: logging.Handler) -> None:
    """Also writes the exception that ends this rank to its file: on the console it may be one of many. If
    its message is all that a person needs, the console shows no traceback."""

    def told(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        what = (__name__, logging.CRITICAL, __file__, 0, f"{ENDED_BY}{kind.__name__}: {error}", (), None)
        record = logging.LogRecord(*what)
        if files and is_hopeless(error):
            shown.handle(record)
        else:
            show_traceback(kind, error, trace)
        record.exc_info = (kind, error, trace)
        for file in files if issubclass(kind, Exception) else ():
            file.handle(record)

    sys.excepthook = told


def log_file(folder: Path, rank: int) -> Path:
    """The log file of a rank in a run directory."""
    return folder / LOGS / f"rank_{rank:05d}.log"


# ---- reading ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which lines to show; None means all."""

    branch: str | None = None
    rank: int | None = None
    level: str | None = None
    """This level and worse."""

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
    """The lines of all ranks so far, sorted by time, without line ends.

    Lines of one record stay together. Differences between the clocks of nodes are not corrected.

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
    """As ``merged``, then whatever is written from now on until ``stop``, including by ranks that appear
    later.

    Lines that arrive within one poll are sorted by time; lines that arrive later come after them.
    """
    chosen = selection or Selection()
    readers: dict[Path, _Reader] = {}
    last = False
    while True:
        last = last or stop()
        batch: list[tuple[str, int, str]] = []
        for number, path in enumerate(_files(folder)):
            reader = readers.setdefault(path, _Reader(path))
            batch += [(when, number, line) for when, line in reader.read()]
        for _, _, line in sorted(batch, key=lambda item: item[:2]):
            if chosen.takes(line):
                yield line
        if last and not batch:
            return
        if not batch:
            time.sleep(poll_seconds)


def _files(folder: Path) -> list[Path]:
    paths = sorted(path for path in (folder / LOGS).glob("rank_*.log") if _NAME.fullmatch(path.name))
    if not paths:
        raise FileNotFoundError(
            f"{folder / LOGS} has no rank_*.log; give the directory of a run with logging.rank_files=true"
        )
    return paths


def _branch_of(path: Path) -> str | None:
    """The branch that a rank's lines name; None before its first line."""
    lines = (line for _, _, line in _timed(path, 0))
    return next((match["branch"] for line in lines if (match := _LINE.match(line))), None)


def _configured_branches(folder: Path) -> list[str]:
    """The branches of the run's resolved configuration; none before it is written."""
    try:
        settings = load_yaml(read_regular(folder / CONFIG, _MAX_CONFIG_BYTES))
        return list(settings["branches"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, RecursionError):
        return []


class _Reader:
    """A file that is read piece by piece, and not held open: a run may have more ranks than a process may
    have open files."""

    def __init__(self, path: Path) -> None:
        self._path, self._place, self._when = path, 0, ""

    def read(self, *, unfinished: bool = False) -> list[tuple[str, str]]:
        """The next lines with their times, some thousands of bytes; none at the end. A line without a time
        (printed by something else, or torn) takes that of the line before it.

        Args:
            unfinished: also a last line that has no end yet.
        """
        found, size = [], 0
        with open_regular(self._path) as file:
            file.seek(self._place)
            while size < _PIECE_BYTES and (line := file.readline(_MAX_LINE_BYTES)):
                if not (unfinished or line.endswith(b"\n") or len(line) == _MAX_LINE_BYTES):
                    break
                size += len(line)
                text = line.decode("utf-8", "replace").rstrip("\r\n")
                self._when = max(_time_of(text), self._when)
                found.append((self._when, text))
        self._place += size
        return found


def _timed(path: Path, number: int) -> Iterator[tuple[str, int, str]]:
    """Lines with their times."""
    reader = _Reader(path)
    while piece := reader.read(unfinished=True):
        for when, line in piece:
            yield when, number, line


def _time_of(line: str) -> str:
    match = _LINE.match(line)
    return match["time"] if match else ""
