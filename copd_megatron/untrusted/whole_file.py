"""Files written whole into folders that others may have made.

A received folder may hold, under the name of what is about to be written, a link to a file of the reader's.
So nothing is opened that is already there: a new file of a random name takes the old one's place, which also
leaves the old content where a disk is full or the program is killed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import BinaryIO, Final

_OF_WRITING: Final = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
_NAME_LETTERS: Final = 150
"""Of a file's name in that of its partial file, so that it does not exceed the usual 255 bytes by much."""


def write_whole(path: str | os.PathLike[str], content: str | bytes, *, durable: bool = False) -> None:
    """Writes a file, as ``replacing`` does. Text is UTF-8.

    Raises:
        OSError: as ``replacing``.
    """
    with replacing(path, durable=durable) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


@contextlib.contextmanager
def replacing(
    path: str | os.PathLike[str], *, durable: bool = False, mode: int | None = None
) -> Iterator[BinaryIO]:
    """A new, empty file that takes the place of ``path`` when the block ends, and vanishes if it raises.

    A link at ``path`` is replaced; what it leads to is left alone.

    Args:
        durable: a crash of the machine, too, leaves the old file or the new one.
        mode: permissions; None: those of an older file, else the usual ones.

    Raises:
        OSError: it cannot be written, or ``path`` is a folder, a FIFO or a device.
    """
    target = Path(path)
    older = _mode_of(target)
    mode = older if mode is None else mode
    partial = target.with_name(f".{target.name[:_NAME_LETTERS]}.{secrets.token_hex(6)}.partial")
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    file = os.fdopen(os.open(partial, flags, 0o666), "wb")
    try:
        with naming(target), file:
            yield file
            file.flush()
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            if durable:
                os.fsync(file.fileno())
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(target.parent)


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """An error of writing, which names no file when it comes of an open one, gets the name of this one."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in _OF_WRITING:
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        raise


def append_whole(file: FileIO, data: bytes) -> None:
    """Appends all of ``data`` to an unbuffered file, or nothing.

    Raises:
        OSError: nothing was appended: the disk is full, for example; it names the file.
    """
    begin = os.fstat(file.fileno()).st_size
    left = memoryview(data)
    try:
        with naming(file.name):
            while left:
                left = left[file.write(left) :]
    except OSError:
        with contextlib.suppress(OSError):
            file.truncate(begin)
        raise


def open_appending(path: str | os.PathLike[str], *, anew: bool = False) -> FileIO:
    """A regular file, open unbuffered for reading and appending; made if it is not there.
    ``anew`` empties it.

    Raises:
        OSError: it cannot be opened, or is a link, a FIFO or a device.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "is a link, and links are not written through", str(path)) from None
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "is no regular file", str(path))
        if anew:
            os.ftruncate(descriptor, 0)
        # opened by its name, which errors of writing need
        return open(path, "a+b", buffering=0, opener=lambda *_: descriptor)
    except BaseException:
        os.close(descriptor)
        raise


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _mode_of(path: Path) -> int | None:
    """Permissions of the file that is there; None where there is none, or a link."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise OSError(errno.EEXIST, "is there already and is no regular file", str(path))
        status = path.lstat()
    except FileNotFoundError:
        return None
    return stat.S_IMODE(status.st_mode) if stat.S_ISREG(status.st_mode) else None
