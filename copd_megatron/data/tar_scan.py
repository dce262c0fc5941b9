"""Where the members of a tar lie, from its headers alone.

``tarfile`` builds an object per header (five times slower, which every rank would pay at start-up), and it
takes a damaged header, or a file cut between two members, for the end of the archive. Here both are errors.
The ustar, GNU and pax forms of names and sizes are understood; POSIX.1 defines the format as the "ustar
interchange format".

Any file ends the scan after at most one step per 512 bytes: the position only grows.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import NamedTuple

BLOCK_BYTES = 512

_ZEROS = bytes(BLOCK_BYTES)
_REGULAR = frozenset(b"0\x007")
_PAX, _PAX_OF_ALL, _GNU_LONG_NAME, _GNU_LONG_LINK = b"xgLK"
_NO_MEMBERS = frozenset(b"3456V")
"""Devices, folders, FIFOs, and an archive's label: nothing in them is lost."""
_WITHOUT_BYTES = {ord("1"): "a hard link", ord("2"): "a symbolic link", ord("S"): "a sparse file"}
_OCTAL = re.compile(rb" *([0-7]*) *(?:\0|$)")
_MAX_NAME_BYTES = 1 << 20
"""Of a pax header or a GNU long name. Linux allows paths of 4,096 bytes."""
_MAX_SIZE_DIGITS = 20
_MAX_PADDING_BYTES = 1 << 20
"""Of zeros behind the last member: tar fills its records, which have at most so many bytes."""


class TarDamageError(Exception):
    """The file is not a whole tar of plain files; the message says what is wrong and at which byte."""


class TarEntry(NamedTuple):
    name: str
    offset: int
    """Of the first byte of its data."""
    size: int


def scan_open_tar(descriptor: int) -> Iterator[TarEntry]:
    """Regular files of an open tar, in order. Reads headers only.

    Raises TarDamageError (not a tar, cut off, damaged, a member that is no plain file, something behind its
    end), OSError.
    """
    total = os.fstat(descriptor).st_size
    position = 0
    long_name: str | None = None
    long_size: int | None = None
    while True:
        header = os.pread(descriptor, BLOCK_BYTES, position)
        if len(header) < BLOCK_BYTES:
            raise TarDamageError(f"cut off at byte {total}")
        if header == _ZEROS:
            _refuse_what_follows(descriptor, position, total)
            return
        if not _checksum_holds(header):
            raise TarDamageError(f"damaged header at byte {position}" if position else "not a tar")
        kind = header[156]
        data = position + BLOCK_BYTES
        size = _number(header[124:136])
        name = _name(header) if long_name is None else long_name
        _refuse_kind(kind, name)
        if kind in _REGULAR and long_size is not None:
            size = long_size
        if data + size > total:
            raise TarDamageError(f"cut off at byte {total}, within the member at byte {position}")
        if kind == _PAX:
            long_name, long_size = _pax(_extended(descriptor, size, data, position), position)
        elif kind == _PAX_OF_ALL:
            if _pax(_extended(descriptor, size, data, position), position) != (None, None):
                raise TarDamageError(f"the header at byte {position} gives all members one name or size")
        elif kind == _GNU_LONG_NAME:
            long_name = _text(_extended(descriptor, size, data, position).rstrip(b"\0"))
        else:
            if kind in _REGULAR:
                yield TarEntry(name, data, size)
            long_name = long_size = None
        position = data + -(-size // BLOCK_BYTES) * BLOCK_BYTES


def _refuse_kind(kind: int, name: str) -> None:
    """Members that hold something which cannot be read here: leaving them out would lose it."""
    if kind in _WITHOUT_BYTES:
        raise TarDamageError(
            f"member {name!r} is {_WITHOUT_BYTES[kind]}; only plain files can be read. tar's options "
            "--hard-dereference and --dereference store the files themselves"
        )
    if kind not in _REGULAR | _NO_MEMBERS | {_PAX, _PAX_OF_ALL, _GNU_LONG_NAME, _GNU_LONG_LINK}:
        raise TarDamageError(f"member {name!r} is of kind {chr(kind)!r}; only plain files can be read")


def _refuse_what_follows(descriptor: int, position: int, total: int) -> None:
    """Whatever stands behind the first block of zeros, which ends a tar, would be lost."""
    rest = os.pread(descriptor, _MAX_PADDING_BYTES, position)
    if rest.strip(b"\0"):
        begin = position + len(rest) - len(rest.lstrip(b"\0"))
        raise TarDamageError(
            f"it ends at byte {position}, but something follows at byte {begin}: two tars one after the "
            "other are no tar (tar --concatenate joins them)"
        )
    if total - position > _MAX_PADDING_BYTES:
        raise TarDamageError(f"it ends at byte {position}, and {total - position} bytes follow")


def _checksum_holds(header: bytes) -> bool:
    # The sum of all bytes, the eight of the checksum itself counted as spaces.
    try:
        return _number(header[148:156]) == sum(header) - sum(header[148:156]) + 8 * 32
    except TarDamageError:
        return False


def _number(field: bytes) -> int:
    """A header's number, never negative."""
    if field[0] == 0x80:  # GNU: binary, for what octal digits cannot hold
        return int.from_bytes(field[1:], "big")
    match = _OCTAL.match(field)
    if match is None:
        raise TarDamageError(f"a header field reads {field!r}, which is not a size")
    return int(match.group(1) or b"0", 8)


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    return _text(name)


def _extended(descriptor: int, size: int, data: int, position: int) -> bytes:
    if size > _MAX_NAME_BYTES:
        raise TarDamageError(f"the extended header at byte {position} has {size} bytes, which no name needs")
    return os.pread(descriptor, size, data)


def _pax(data: bytes, position: int) -> tuple[str | None, int | None]:
    """Name and size from pax records ``<length> <keyword>=<value>\\n``, None where they do not say."""
    name: str | None = None
    size: int | None = None
    damage = TarDamageError(f"damaged pax header at byte {position}")
    begin = 0
    while begin < len(data):
        space = data.find(b" ", begin, begin + _MAX_SIZE_DIGITS)
        end = begin + _decimal(data[begin : max(space, begin)], damage)
        if not space + 1 < end <= len(data):
            raise damage
        keyword, _, value = data[space + 1 : end - 1].partition(b"=")
        if keyword == b"path":
            name = _text(value)
        elif keyword == b"size":
            size = _decimal(value, damage)
        elif keyword.startswith(b"GNU.sparse."):
            raise TarDamageError(f"the member at byte {position} is a sparse file; store it as a plain one")
        begin = end
    return name, size


def _decimal(digits: bytes, damage: TarDamageError) -> int:
    if not digits.isdigit() or len(digits) > _MAX_SIZE_DIGITS:
        raise damage
    return int(digits)


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "backslashreplace")
