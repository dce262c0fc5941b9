"""Output to a terminal or a pipe: harmless, and as long as somebody reads it."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from copd_megatron.errors import ConfigError
from copd_megatron.untrusted.json_text import load_file
from copd_megatron.untrusted.regular_file import open_regular
from copd_megatron.untrusted.visible import visible


def say(text: object = "", *, file: TextIO | None = None, end: str = "\n", flush: bool = False) -> None:
    """Prints text, whoever wrote parts of it: control characters are shown, not sent to the terminal. A
    reader that has left (``| head``) does not keep a command from its work."""
    try:
        print(visible(str(text)), file=file, end=end, flush=flush)
    except BrokenPipeError:
        _to_nowhere(sys.stdout if file is None else file)


def refuse_other(path: Path, begin: bytes, what: str) -> None:
    """Raises ConfigError if something else than an older output is at a path that a command would replace.

    Args:
        begin: what all such outputs begin with.
        what: their name.
    """
    try:
        with open_regular(path) as file:
            known = file.read(len(begin)) in (begin, b"")
    except FileNotFoundError:
        return
    except OSError:
        known = False
    if not known:
        raise ConfigError(f"{path} is there already and is no {what}: it is left alone; give another name")


def refuse_other_record(path: Path, keys: Collection[str], what: str, *, beside: Sequence[Path] = ()) -> None:
    """As ``refuse_other``, of a JSON object that is known by its keys.

    Args:
        beside: files that the command writes together with it, which are somebody's where it is missing.
    """
    there = next((file for file in (path, *beside) if os.path.lexists(file)), None)
    if there is None:
        return
    try:
        known = set(keys) <= load_file(path).keys()
    except (OSError, ValueError):
        known = False
    if not known:
        raise ConfigError(f"{there} is there already and is no {what}: it is left alone; give another name")


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """Around printing alone: a reader that has seen enough (``| head``) ends the output, not the command."""
    try:
        yield
        if sys.stdout is not None:  # closed by whoever started this
            sys.stdout.flush()
    except BrokenPipeError:
        _to_nowhere(sys.stdout)


def _to_nowhere(file: TextIO) -> None:
    """Where nobody reads: also what is still buffered, or Python complains when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())
