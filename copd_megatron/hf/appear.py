"""Folders that get their name when they are complete. Imports no torch."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def partial_of(target: Path) -> Path:
    """Where a folder is written before it gets its name."""
    return target.with_name(target.name + ".partial")


def appear(partial: Path, target: Path) -> None:
    """Renames a finished folder. What has stood under its name is deleted only afterwards: a folder, a file
    or a link, but not what a link leads to.

    Raises:
        OSError: the folder cannot be renamed.
    """
    if not os.path.lexists(target):
        partial.rename(target)
        return
    old = _unused(target.with_name(target.name + ".old"))
    target.rename(old)
    partial.rename(target)
    if old.is_dir() and not old.is_symlink():
        shutil.rmtree(old)
    else:
        old.unlink()


def _unused(path: Path) -> Path:
    number = 0
    while os.path.lexists(found := path.with_name(f"{path.name}{number or ''}")):
        number += 1
    return found
