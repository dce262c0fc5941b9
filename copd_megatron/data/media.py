"""Which members of a sample are media, how they are referred to, and how their hash is checked.

A member's extension says what it is: ``0.png``, ``1.jpg`` ... are images, ``mp4``, ``1.mp4`` ... videos. The
first ``<image>`` of a prompt stands for the first image member in natural order, and so on. A few extensions
are notes beside the sample, which are ignored. A member with any other extension is probably a medium that
cannot be shown; such a sample is skipped, because its prompt makes no sense without it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import NamedTuple

from copd_megatron.errors import BadSampleError, DataError
from copd_megatron.records import MediaRef

IMAGE = "image"
VIDEO = "video"

MAX_BYTES = {IMAGE: 256 << 20, VIDEO: 2 << 30}
"""Largest file that is read. It is held in memory as a whole by each rank that decodes it, and a tar may
announce any size: an image of the default pixel limit has less than a tenth of this, uncompressed, and a long
video a fraction."""

_KINDS = {
    **dict.fromkeys(("png", "jpg", "jpeg", "jpe", "jfif", "webp"), IMAGE),
    **dict.fromkeys(("mp4", "m4v", "mov", "mkv", "webm", "avi"), VIDEO),
}
_NOTES = frozenset(
    ["json", "txt", "text", "transcript", "cls", "cls2", "class", "count", "index", "inx", "id"]
)
"""Texts and labels, by webdataset's conventions."""


class MediaMismatchError(DataError):
    """A medium differs from what its reference says: branches do not read the same data."""


class MediaPlace(NamedTuple):
    """Where a medium is stored, before its content is known."""

    source: str
    """Name of the shard set, see ``MediaRef.source``."""
    shard: str
    key: str
    extension: str

    @property
    def kind(self) -> str:
        kind = kind_of(self.extension)
        assert kind is not None
        return kind

    def ref(self, digest: str) -> MediaRef:
        """The reference to this place, given the hash of what was found there."""
        return MediaRef(**self._asdict(), kind=self.kind, content_hash=digest)


def place_of(ref: MediaRef) -> MediaPlace:
    """The place a reference names."""
    return MediaPlace(ref.source, ref.shard, ref.key, ref.extension)


def kind_of(extension: str) -> str | None:
    """``image`` or ``video``, from the last part of a member's extension; None for anything else."""
    return _KINDS.get(_suffix(extension))


def refuse_large(extension: str, num_bytes: int, where: str) -> None:
    """Raises BadSampleError (``too_large``) for a medium that is too large to be read."""
    limit = MAX_BYTES[kind_of(extension) or VIDEO]
    if num_bytes > limit:
        raise BadSampleError(
            where, "too_large", f"member .{extension} has {num_bytes} bytes", f"Keep it below {limit}."
        )


def media_members(extensions: Iterable[str]) -> tuple[str, ...]:
    """The media among a sample's members, in natural order (``2.png`` before ``10.png``)."""
    return tuple(sorted((name for name in extensions if kind_of(name) is not None), key=_natural))


def refuse_unknown_members(extensions: Iterable[str], where: str) -> None:
    """Raises BadSampleError (``unknown_format``) for a member that is neither a medium nor a note."""
    unknown = sorted(name for name in extensions if kind_of(name) is None and _suffix(name) not in _NOTES)
    if unknown:
        raise BadSampleError(
            where,
            "unknown_format",
            f"member(s) {', '.join('.' + name for name in unknown)} are of a kind that cannot be shown",
            f"Store media as {', '.join(_KINDS)}; notes may be {', '.join(sorted(_NOTES))}.",
        )


def _suffix(extension: str) -> str:
    return extension.rsplit(".", 1)[-1].lower()


def _natural(extension: str) -> tuple[tuple[int, int, str], ...]:
    # A member without a number ("mp4") comes before numbered ones.
    return tuple(
        (0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.findall(r"\d+|\D+", extension)
    )


def content_hash(data: bytes) -> str:
    """Hash of an encoded file, as in ``MediaRef.content_hash``."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def check_hash(ref: MediaRef, found: str, where: str) -> None:
    """Raises MediaMismatchError, naming sample, shard and both hashes, unless ``found`` is the ref's hash."""
    if found != ref.content_hash:
        raise MediaMismatchError(
            f"{where}: {ref.kind} member .{ref.extension} has content hash {found}, but the prompt "
            f"{ref.shard}/{ref.key} was sampled with {ref.content_hash}. The branches read different files "
            f"as {ref.source}: give every branch the same shards, and do not change them during a run."
        )
