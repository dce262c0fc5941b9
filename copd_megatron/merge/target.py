"""Whether a merge may write where it is told to: what it did not make, and what it reads, stays."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from copd_megatron.errors import ConfigError
from copd_megatron.merge.journal import Journal
from copd_megatron.untrusted.json_text import load_file


def check_target(target: Path, *, overwrite: bool) -> None:
    """Refuses a target that is no folder's name, or has something under it already.

    Raises:
        ConfigError: it is no folder's name, holds the working directory, or is a symbolic link.
        FileExistsError: there is a file of that name, or a folder that is not to be overwritten.
    """
    if Path.cwd().is_relative_to(target.resolve()) and not target.is_symlink():
        raise ConfigError(f"merge: --out {target} holds the working directory; give a folder to be made")
    if target.is_symlink():
        raise ConfigError(
            f"merge: --out {target} is a symbolic link; give what it leads to, {target.resolve()}"
        )
    for parent in target.parents:
        if parent.exists() and not parent.is_dir():
            raise ConfigError(f"merge: --out {target}: {parent} is a file; choose another folder")
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"merge: --out {target} is a file; choose another name")
    if target.exists() and not overwrite:
        raise FileExistsError(f"merge: {target} is there already; choose another folder or overwrite it")


def check_partial(partial: Path, journal: Journal, target: Path, read: Sequence[Path]) -> None:
    """Refuses to replace or to remove what is not a merge's own, or is read by this one.

    Args:
        partial: where the unfinished result goes.
        journal: of what stands there.
        target: where the result goes.
        read: files and folders that the merge reads.

    Raises:
        ConfigError: one of them would be destroyed.
        FileExistsError: something that no merge made is in the way.
    """
    for path in read:
        for folder in (target, partial):
            refuse_to_overwrite(folder, path)
    if os.path.lexists(partial) and (partial.is_symlink() or not journal.exists):
        if partial.is_dir() and not partial.is_symlink() and not any(partial.iterdir()):
            return
        raise FileExistsError(
            f"merge: {partial}, where the unfinished result would go, is there already and no merge made it; "
            "move it, or choose another --out"
        )


def refuse_to_overwrite(folder: Path, path: Path) -> None:
    """Raises ConfigError if writing a folder anew would destroy a path that the command names."""
    if _holds(folder, path):
        raise ConfigError(
            f"merge: --out: {folder} holds {path}, which is read; overwriting it would destroy that: choose "
            "another folder"
        )


def refuse_other_report(path: Path) -> None:
    """Raises ConfigError if a report's place holds another JSON file, such as a model's config.json, or files
    of the report's other names without one."""
    beside = [path.with_suffix(suffix) for suffix in (".md", ".png")]
    if not os.path.lexists(path):
        if there := next((other for other in beside if os.path.lexists(other)), None):
            raise ConfigError(
                f"merge: --report: {there} is there already and is of no report; give another name"
            )
        return
    try:
        known = "branches" in load_file(path)
    except (ValueError, OSError, TypeError, RecursionError):
        known = False
    if not known:
        raise ConfigError(f"merge: --report: {path} is there already and is no report; give another name")


def _holds(folder: Path, path: Path) -> bool:
    """Whether a path is a folder or lies in it."""
    if not folder.exists():
        return False
    resolved = path.resolve()
    return any(one.exists() and one.samefile(folder) for one in (resolved, *resolved.parents))
