"""Which members of a sample are media, how they are referred to, and reading them with their hash checked.

Media members are named by extension: ``0.png``, ``1.jpg`` ... are images, ``mp4``, ``1.mp4`` ... videos. The
first ``<image>`` of a prompt is the image member that comes first in natural order, and so on.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import NamedTuple

from copd_megatron.errors import DataError
from copd_megatron.records import MediaRef

IMAGE = "image"
VIDEO = "video"

_KINDS = {
    **dict.fromkeys(("png", "jpg", "jpeg", "webp"), IMAGE),
    **dict.fromkeys(("mp4", "m4v", "mov", "mkv", "webm", "avi"), VIDEO),
}


class MediaMismatchError(DataError):
    """A medium is not what a reference says it is: branches do not read the same data."""


class MediaPlace(NamedTuple):
    """Where a medium lies, before its content is known."""

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
        """The reference to this place, with the hash of what was found there."""
        return MediaRef(**self._asdict(), kind=self.kind, content_hash=digest)


def place_of(ref: MediaRef) -> MediaPlace:
    """The place a reference names."""
    return MediaPlace(ref.source, ref.shard, ref.key, ref.extension)


def kind_of(extension: str) -> str | None:
    """``image`` or ``video`` by the end of a member's extension; None for anything else."""
    return _KINDS.get(extension.rsplit(".", 1)[-1].lower())


def media_members(extensions: Iterable[str]) -> tuple[str, ...]:
    """The media among a sample's members, in natural order (``2.png`` before ``10.png``)."""
    return tuple(sorted((name for name in extensions if kind_of(name) is not None), key=_natural))


def _natural(extension: str) -> tuple[tuple[int, int, str], ...]:
    # A member without a number ("mp4") comes before numbered ones.
    return tuple(
        (0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.findall(r"\d+|\D+", extension)
    )


def content_hash(data: bytes) -> str:
    """Hash of an encoded file, as ``MediaRef`` carries it."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def check_hash(ref: MediaRef, found: str, where: str) -> None:
    """Raises MediaMismatchError, naming sample, shard and both hashes, unless ``found`` is the ref's hash."""
    if found != ref.content_hash:
        raise MediaMismatchError(
            f"{where}: {ref.kind} member .{ref.extension} has content hash {found}, but the prompt "
            f"{ref.shard}/{ref.key} was sampled with {ref.content_hash}. The branches read different files "
            f"as {ref.source}: give every branch the same shards, and do not write to them during a run."
        )
