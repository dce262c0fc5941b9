"""What lies in a machine's shared memory, and what of it nobody uses any more."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

SHARED_MEMORY: Final = Path("/dev/shm")
_NAMED: Final = 3


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A file in shared memory."""

    path: Path
    num_bytes: int
    """That it takes up."""
    in_use: bool
    """Some process has it open or mapped, or might: other people's processes do not say, and those of another
    container cannot be seen."""


def segments(folder: Path = SHARED_MEMORY) -> list[Segment]:
    """Everything in a folder of shared memory, the largest first; nothing if it cannot be read."""
    found = []
    used, seen_all = _used(folder)
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return []
    for entry in entries:
        try:
            status = entry.stat(follow_symlinks=False)
        except OSError:  # it has gone meanwhile
            continue
        if stat.S_ISREG(status.st_mode):
            in_use = entry.path in used or not (seen_all or status.st_uid == os.geteuid())
            found.append(Segment(path=Path(entry.path), num_bytes=512 * status.st_blocks, in_use=in_use))
    return sorted(found, key=lambda segment: -segment.num_bytes)


def left_behind(folder: Path = SHARED_MEMORY) -> str:
    """The segments that no process uses, in words, with how to remove them; empty if there are none."""
    unused = [segment for segment in segments(folder) if not segment.in_use and segment.num_bytes]
    if not unused:
        return ""
    total = sum(segment.num_bytes for segment in unused) / 2**20
    named = " ".join(str(segment.path) for segment in unused[:_NAMED])
    more = f" and {len(unused) - _NAMED} more" if len(unused) > _NAMED else ""
    return f"no process seen from here uses {total:.0f} MiB, as killed runs leave behind: rm {named}{more}"


def _used(folder: Path) -> tuple[set[str], bool]:
    """Paths below the folder that processes have open or mapped, and whether every process said so."""
    used, seen_all = set[str](), True
    for process in Path("/proc").glob("[0-9]*"):
        try:
            used.update(_mapped(process, f"{folder}/"))
            used.update(_open(process))
        except PermissionError:
            seen_all = False
        except OSError:  # it has ended
            continue
    return used, seen_all


def _mapped(process: Path, prefix: str) -> Iterator[str]:
    for line in (process / "maps").read_text(errors="surrogateescape").splitlines():
        _, found, name = line.partition(prefix)
        if found:
            yield prefix + name


def _open(process: Path) -> Iterator[str]:
    for descriptor in os.listdir(process / "fd"):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            yield os.readlink(process / "fd" / descriptor)
