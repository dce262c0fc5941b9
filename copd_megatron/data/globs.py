"""Names that a pattern with ``*``, ``?`` and ``[...]`` stands for, as ``glob.glob`` finds them, within a
budget.

A pattern may come from a received configuration, and some never end: ``/proc/*/root`` is the whole file
system again, once for every process.
"""

from __future__ import annotations

import fnmatch
import glob
import os
from dataclasses import dataclass
from typing import Final

MAX_ENTRIES: Final = 500_000


@dataclass
class Budget:
    """Names that may still be looked at, for all patterns that share it."""

    left: int = MAX_ENTRIES

    def take(self, number: int) -> None:
        """Raises ValueError where it is used up."""
        self.left -= number
        if self.left < 0:
            raise ValueError("too many names would have to be looked at")


def names_like(pattern: str, budget: Budget) -> list[str]:
    """Existing paths that a pattern stands for, in no order. Names that begin with a dot are found only by
    patterns that do.

    Raises:
        ValueError: the budget does not suffice.
    """
    drive = os.sep if pattern.startswith(os.sep) else ""
    parts = [part for part in pattern.split(os.sep) if part]
    found = [drive]
    for place, part in enumerate(parts):
        is_last = place == len(parts) - 1 and not pattern.endswith(os.sep)
        below: list[str] = []
        for folder in found:
            below += [os.path.join(folder, name) for name in _matching(folder, part, budget)]
        found = below if is_last else [path for path in below if os.path.isdir(path)]
    return found if parts else []


def _matching(folder: str, part: str, budget: Budget) -> list[str]:
    """Names in a folder that one part of a pattern stands for."""
    budget.take(1)
    if not glob.has_magic(part):
        return [part] if os.path.lexists(os.path.join(folder, part)) else []
    try:
        names = os.listdir(folder or os.curdir)
    except OSError:
        return []
    budget.take(len(names))
    if not part.startswith("."):
        names = [name for name in names if not name.startswith(".")]
    return fnmatch.filter(names, part)
