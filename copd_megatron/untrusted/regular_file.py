"""Files that somebody else named, opened without waiting and only if they hold data of a known size."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

_PIECE_BYTES: Final = 8 << 20


class FileState(NamedTuple):
    """What changes when somebody writes to a file, or puts another one in its place."""

    num_bytes: int
    modified_ns: int

    @classmethod
    def of(cls, descriptor: int) -> FileState:
        """Of an open file, as it is now."""
        status = os.fstat(descriptor)
        return cls(status.st_size, status.st_mtime_ns)


def open_regular(
    path: str | os.PathLike[str],
    *,
    max_bytes: int | None = None,
    inside: Path | None = None,
    as_of: FileState | None = None,
    buffered: bool = True,
) -> BinaryIO:
    """A regular file, open for reading. A FIFO without a writer does not block, and a device is not read.

    Args:
        inside: a folder that must hold the file, links followed. A received folder may hold links to
            private files of whoever received it.
        as_of: the state in which places in the file were looked up. In another one they mean nothing.

    Raises:
        OSError: it cannot be opened, is no regular file, has more than ``max_bytes`` bytes, lies outside
            of ``inside``, or is not in the state ``as_of`` any more.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    if inside is not None:
        path, flags = _inside(Path(path), inside), flags | os.O_NOFOLLOW
    descriptor = os.open(path, flags)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, f"is {_kind(status.st_mode)}, no regular file", str(path))
        if max_bytes is not None and status.st_size > max_bytes:
            raise OSError(errno.EFBIG, f"has {status.st_size} bytes, {max_bytes} is the limit", str(path))
        if as_of is not None and (status.st_size, status.st_mtime_ns) != as_of:
            raise OSError(errno.ESTALE, "has been changed or replaced since it was looked up", str(path))
        return os.fdopen(descriptor, "rb") if buffered else os.fdopen(descriptor, "rb", buffering=0)
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: Path, max_bytes: int, *, inside: Path | None = None) -> bytes:
    """All of a regular file. Raises OSError as ``open_regular``, also if the file grows meanwhile."""
    with open_regular(path, max_bytes=max_bytes, inside=inside) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise OSError(errno.EFBIG, f"grows beyond {max_bytes} bytes", str(path))
    return content


def sha256_of(path: Path) -> str:
    """SHA-256 of a regular file, read in pieces. Raises OSError as ``open_regular``."""
    digest = hashlib.sha256()
    with open_regular(path, buffered=False) as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _inside(path: Path, folder: Path) -> Path:
    """The path with links followed."""
    try:
        found = path.resolve(strict=True)
    except RuntimeError:  # links in a circle
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path)) from None
    if not found.is_relative_to(folder.resolve()):
        problem = f"is a link out of {folder}, which is not followed; put the file itself there"
        raise OSError(errno.EPERM, problem, str(path))
    return found


def _kind(mode: int) -> str:
    for test, name in (
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISFIFO, "a FIFO"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    ):
        if test(mode):
            return name
    return "a special file"
