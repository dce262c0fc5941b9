"""Small pictures of a prompt's images and videos, read from the run's own shards."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from copd_megatron.config import Config
from copd_megatron.config.domains import all_domains
from copd_megatron.config.schema import MediaConfig
from copd_megatron.data.decode.image import decode_image
from copd_megatron.data.decode.limits import PixelArray
from copd_megatron.data.decode.video import decode_video
from copd_megatron.data.globs import Budget
from copd_megatron.data.media import VIDEO, content_hash
from copd_megatron.data.shards import ShardIndex, expand_patterns, index_shard, read_bytes
from copd_megatron.errors import BadSampleError, DataError

_SIDE = 128
_MAX_BYTES = 256 << 20
"""Of a file that is worth a picture of 128 pixels."""
_NEEDED = {"content_hash", "kind", "source", "shard", "key", "extension"}
"""What a reference to a medium says."""
_VIDEO = MediaConfig(min_frames=4, max_frames=4)


class Thumbnails:
    """Finds media by the references that samples hold. What cannot be read here (shards on another machine,
    changed since) has no picture."""

    def __init__(self, config: Config) -> None:
        self._paths: dict[tuple[str, str], Path] = {}
        budget = Budget()
        for domain in all_domains(config):
            for part, patterns in (("train", domain.train), ("validation", domain.validation)):
                self._paths |= {(f"{domain.name}/{part}", p.stem): p for p in _local(patterns, budget)}
        self._known: dict[str, str | None] = {}
        self._indexes: dict[Path, ShardIndex] = {}

    def uri(self, medium: Mapping[str, str]) -> str | None:
        """A ``data:`` address of a JPEG of at most 128 pixels a side; of a video, four frames in a row."""
        key = medium.get("content_hash", "")
        if not medium.keys() >= _NEEDED:
            return None
        if key not in self._known:
            data = self._read(medium)
            self._known[key] = None if data is None else _picture(data, medium["kind"])
        return self._known[key]

    def _read(self, medium: Mapping[str, str]) -> bytes | None:
        path = self._paths.get((medium["source"], medium["shard"]))
        if path is None:
            return None
        try:
            index = self._index(path)
            member = (
                index.find(medium["key"], medium["extension"]) if medium["key"] in index.samples else None
            )
            if member is None or member.size > _MAX_BYTES:
                return None
            data = read_bytes(index, member)
        except (OSError, DataError):
            return None
        return data if content_hash(data) == medium["content_hash"] else None

    def _index(self, path: Path) -> ShardIndex:
        """By the headers of the tar alone: a compressed one, which could expand to anything, is refused."""
        if path not in self._indexes:
            self._indexes[path] = index_shard(path)
        return self._indexes[path]


def _local(patterns: Sequence[str], budget: Budget) -> list[Path]:
    """The shards that are files of this machine. Nothing is fetched: the configuration came with the run, and
    may be a stranger's."""
    found = []
    for pattern in patterns:
        try:
            found += expand_patterns([pattern], local_only=True, budget=budget)
        except DataError:
            continue
    return found


def _picture(data: bytes, kind: str) -> str | None:
    try:
        if kind == VIDEO:
            pictures = [_small(frame) for frame in decode_video(data, "thumbnail", _VIDEO).frames]
        else:
            limit = MediaConfig().max_pixels_hard_limit
            pictures = [_small(decode_image(data, "thumbnail", max_pixels=limit))]
    except BadSampleError:
        return None
    joined = Image.fromarray(np.concatenate([np.asarray(picture) for picture in pictures], axis=1))
    buffer = io.BytesIO()
    joined.save(buffer, format="JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _small(pixels: PixelArray) -> Image.Image:
    picture = Image.fromarray(pixels)
    picture.thumbnail((_SIDE, _SIDE))
    return picture
