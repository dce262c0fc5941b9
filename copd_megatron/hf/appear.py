"""Folders that get their name when they are complete. Imports no torch."""

from __future__ import annotations

import shutil
from pathlib import Path


def partial_of(target: Path) -> Path:
    """Where a folder is written before it gets its name."""
    return target.with_name(target.name + ".partial")


def appear(partial: Path, target: Path) -> None:
    """Renames a finished folder. What has stood under its name is deleted only afterwards.

    Raises:
        OSError: the folder cannot be renamed.
    """
    if not target.exists():
        partial.rename(target)
        return
    old = _unused(target.with_name(target.name + ".old"))
    target.rename(old)
    partial.rename(target)
    shutil.rmtree(old)


def _unused(path: Path) -> Path:
    number = 0
    while (found := path.with_name(f"{path.name}{number or ''}")).exists():
        number += 1
    return found
