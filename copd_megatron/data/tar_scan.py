"""Where the members of a tar lie, from its headers alone.

``tarfile`` builds an object per header (five times slower, which every rank would pay at start-up), and it
takes a damaged header or a file cut between two members for the end of the archive. Here both are errors.
Understood are the ustar, GNU and pax forms of names and sizes; the format is POSIX.1's "ustar interchange
format".
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

BLOCK_BYTES = 512

_ZEROS = bytes(BLOCK_BYTES)
_REGULAR = frozenset(b"0\x007")
_PAX, _GNU_LONG_NAME = b"xL"


class TarDamageError(Exception):
    """The file is not a whole tar; the message says what is wrong and at which byte."""


class TarEntry(NamedTuple):
    name: str
    offset: int
    """Of the first byte of its data."""
    size: int


def scan_tar(path: Path) -> Iterator[TarEntry]:
    """Regular files of a tar, in order. Reads headers only.

    Raises TarDamageError (not a tar, cut off, damaged), OSError.
    """
    with open(path, "rb", buffering=0) as file:
        descriptor = file.fileno()
        total = os.fstat(descriptor).st_size
        position = 0
        long_name: str | None = None
        long_size: int | None = None
        while True:
            header = os.pread(descriptor, BLOCK_BYTES, position)
            if len(header) < BLOCK_BYTES:
                raise TarDamageError(f"cut off at byte {total}")
            if header == _ZEROS:
                return
            if not _checksum_holds(header):
                raise TarDamageError(f"damaged header at byte {position}" if position else "not a tar")
            kind = header[156]
            data = position + BLOCK_BYTES
            size = _number(header[124:136])
            if kind in _REGULAR:
                size = size if long_size is None else long_size
                name = _name(header) if long_name is None else long_name
            if data + size > total:
                raise TarDamageError(f"cut off at byte {total}, within the member at byte {position}")
            if kind == _PAX:
                long_name, long_size = _pax(os.pread(descriptor, size, data), position)
            elif kind == _GNU_LONG_NAME:
                long_name = _text(os.pread(descriptor, size, data).rstrip(b"\0"))
            else:
                if kind in _REGULAR:
                    yield TarEntry(name, data, size)
                long_name = long_size = None
            position = data + -(-size // BLOCK_BYTES) * BLOCK_BYTES


def _checksum_holds(header: bytes) -> bool:
    # The sum of all bytes, the eight of the checksum itself counted as spaces.
    try:
        return _number(header[148:156]) == sum(header) - sum(header[148:156]) + 8 * 32
    except TarDamageError:
        return False


def _number(field: bytes) -> int:
    if field[0] == 0x80:  # GNU: binary, for what octal digits cannot hold
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.partition(b"\0")[0].strip() or b"0", 8)
    except ValueError as error:
        raise TarDamageError(f"a header field reads {field!r}, not a number") from error


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    return _text(name)


def _pax(data: bytes, position: int) -> tuple[str | None, int | None]:
    """Name and size from pax records ``<length> <keyword>=<value>\\n``, None where they do not say."""
    name: str | None = None
    size: int | None = None
    while data:
        digits, _, _ = data.partition(b" ")
        if not digits.isdigit() or not 0 < int(digits) <= len(data):
            raise TarDamageError(f"damaged pax header at byte {position}")
        keyword, _, value = data[len(digits) + 1 : int(digits) - 1].partition(b"=")
        if keyword == b"path":
            name = _text(value)
        elif keyword == b"size":
            if not value.isdigit():
                raise TarDamageError(f"damaged pax header at byte {position}")
            size = int(value)
        data = data[int(digits) :]
    return name, size


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")
