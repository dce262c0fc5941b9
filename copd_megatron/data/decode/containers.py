"""What kind of file a video is, and how long it claims to be, read before FFmpeg sees it.

FFmpeg tries hundreds of formats, some of which are lists of other files to open or network sessions to join.
Here the first bytes decide among three containers, and FFmpeg is told which. The containers also say how many
bytes they have: a file that is shorter was cut off, which FFmpeg often takes for an early end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_BOXES = frozenset(
    b"ftyp moov mdat free skip wide moof mfra sidx ssix uuid meta styp emsg prft pdin pnot PICT junk".split()
)
_EBML_HEADER, _SEGMENT = 0x1A45DFA3, 0x18538067
_ELEMENTS = frozenset(
    [
        *(_EBML_HEADER, _SEGMENT),
        *(0xEC, 0xBF),  # void, checksum
        *(0x114D9B74, 0x1549A966, 0x1654AE6B, 0x1F43B675),  # seek head, info, tracks, cluster
        *(0x1C53BB6B, 0x1254C367, 0x1043A770, 0x1941A469),  # cues, tags, chapters, attachments
    ]
)
_MAX_ELEMENTS = 100_000
"""Looked at in one file; whatever follows is not checked for being whole."""


@dataclass(frozen=True)
class VideoContainer:
    """A container that is read."""

    demuxer: str
    """FFmpeg's name of what reads it."""
    claimed_bytes: int
    """Length of the file as far as its structure tells; a longer file has something appended."""


def video_container(data: bytes) -> VideoContainer | None:
    """The container of an encoded video: MP4 or QuickTime, Matroska or WebM, AVI. None for anything else."""
    if data[4:8] in _BOXES:
        return VideoContainer("mov", _end_of_boxes(data))
    if data[:4] == _EBML_HEADER.to_bytes(4):
        return VideoContainer("matroska", _end_of_ebml(data))
    if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        return VideoContainer("avi", _end_of_riff(data))
    return None


def refuse_other_files(url: str, *_: Any) -> None:
    """FFmpeg's request to open another file or address, which a video never needs. Raises ValueError."""
    raise ValueError(f"the video refers to {url!r}; a sample's media must be whole in themselves")


def _end_of_boxes(data: bytes) -> int:
    """ISO base media: boxes of a 4-byte length, a 4-byte type and, for length 1, an 8-byte length."""
    position = 0
    for _ in range(_MAX_ELEMENTS):
        header = data[position : position + 16]
        if len(header) < 8 or header[4:8] not in _BOXES:
            break
        size = int.from_bytes(header[:4])
        if size == 1 and len(header) == 16:
            size = int.from_bytes(header[8:])
        if size < 8:  # 0: the box extends to the end of the file
            break
        position += size
    return position


def _end_of_ebml(data: bytes) -> int:
    """EBML: a header and a segment; of a segment of unknown length, as streams have it, its elements."""
    position = 0
    for _ in range(_MAX_ELEMENTS):
        element = _vint(data, position)
        size = _vint(data, element[1]) if element is not None else None
        if element is None or size is None or element[0] not in _ELEMENTS:
            break
        name, body = element[0], size[1]
        value_bits = 7 * (body - element[1])
        length = size[0] & ((1 << value_bits) - 1)
        unknown = length == (1 << value_bits) - 1
        if unknown and name != _SEGMENT:
            break
        position = body if unknown else body + length
        if name == _SEGMENT and not unknown:
            break
    return position


def _vint(data: bytes, position: int) -> tuple[int, int] | None:
    """An EBML number, its length marker included, and where it ends; None if it is not there.

    The position of the first 1 bit in the first byte is the number of bytes.
    """
    if position >= len(data) or not data[position]:
        return None
    width = 9 - data[position].bit_length()
    if position + width > len(data):
        return None
    return int.from_bytes(data[position : position + width]), position + width


def _end_of_riff(data: bytes) -> int:
    """RIFF: chunks of a 4-byte type and a 4-byte length, padded to an even length."""
    position = 0
    for _ in range(_MAX_ELEMENTS):
        header = data[position : position + 8]
        size = int.from_bytes(header[4:8], "little")
        if len(header) < 8 or header[:4] != b"RIFF" or not size:
            break
        position += 8 + size
        if position < len(data):
            position += size % 2
    return position
