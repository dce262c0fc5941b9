"""The media of a lane's rows on the wire: references, each written once, and, where branches do not share
storage, the encoded files. Pure.

A section is an int64 length, that many bytes of JSON, and the files one after the other. The JSON holds
``refs`` (each a list of the fields of ``MediaRef``), ``rows`` (per row of the lane, indices into ``refs``)
and ``sizes`` (per reference, bytes of its file; 0 where it does not travel). Without media it is empty.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields

from copd_megatron.opd.records import ScoreRequest
from copd_megatron.records import MediaRef
from copd_megatron.untrusted.json_text import load_object, made


def pack_media(requests: Sequence[ScoreRequest], encoded: Callable[[MediaRef], bytes] | None) -> bytes:
    """The section of one lane. ``encoded`` gives the files that travel; None: only references do."""
    refs: dict[MediaRef, int] = {}
    rows = [[refs.setdefault(ref, len(refs)) for ref in request.media] for request in requests]
    if not refs:
        return b""
    files = [encoded(ref) if encoded is not None else b"" for ref in refs]
    head = json.dumps(
        {"refs": [astuple(ref) for ref in refs], "rows": rows, "sizes": [len(file) for file in files]},
        allow_nan=False,
    ).encode()
    return b"".join([len(head).to_bytes(8, "little"), head, *files])


def unpack_media(section: bytes, num_rows: int) -> tuple[list[tuple[MediaRef, ...]], dict[MediaRef, bytes]]:
    """References per row, and the files that travelled.

    Raises:
        ValueError: the section is not one of ``num_rows`` rows.
    """
    if not section:
        return [()] * num_rows, {}
    end = 8 + int.from_bytes(section[:8], "little")
    head = made(_Head, load_object(section[8:end]))
    names = [field.name for field in fields(MediaRef)]
    refs = [MediaRef(**dict(zip(names, values, strict=True))) for values in head.refs]
    if len(head.rows) != num_rows or end + sum(head.sizes) != len(section):
        raise ValueError(
            f"media section of {len(section)} bytes for {len(head.rows)} rows; expected {num_rows} rows "
            f"in {end + sum(head.sizes)} bytes"
        )
    if min(head.sizes, default=0) < 0 or any(not 0 <= i < len(refs) for row in head.rows for i in row):
        raise ValueError("a size is negative, or a row has a medium that is not listed")
    files: dict[MediaRef, bytes] = {}
    for ref, size in zip(refs, head.sizes, strict=True):
        if size:
            files[ref] = section[end : end + size]
            end += size
    return [tuple(refs[i] for i in row) for row in head.rows], files


@dataclass(frozen=True)
class _Head:
    refs: tuple[tuple[str, ...], ...]
    rows: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]
