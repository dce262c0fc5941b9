"""Images and videos of a data set's rows: found, read, and made fit for a shard."""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from copd_megatron.config.schema import MediaConfig
from copd_megatron.data.decode.containers import video_container
from copd_megatron.data.decode.image import decode_image, storable_image
from copd_megatron.data.decode.video import decode_video
from copd_megatron.data.failures import name_and_text
from copd_megatron.data.media import IMAGE, MAX_BYTES, VIDEO, content_hash, kind_of
from copd_megatron.data.samples import texts_and_media
from copd_megatron.errors import BadSampleError
from copd_megatron.untrusted.regular_file import read_regular

_LIMITS = MediaConfig()


@dataclass(frozen=True, kw_only=True)
class MediaSource:
    """A medium of a row: a file below the media folder, or the bytes themselves."""

    kind: str
    path: str | None = None
    data: bytes | None = None


def medium_source(entry: Any, kind: str, where: str) -> MediaSource:
    """What a row's field names: a path, or ``{"bytes", "path"}`` as Hugging Face's image columns have it; in
    JSON, ``bytes`` is base64. Raises BadSampleError for anything else."""
    if isinstance(entry, str):
        return MediaSource(kind=kind, path=entry)
    if isinstance(entry, Mapping):
        data = entry.get("bytes")
        if isinstance(data, bytes | bytearray):
            return MediaSource(kind=kind, data=bytes(data))
        if isinstance(data, str):
            try:
                return MediaSource(kind=kind, data=base64.b64decode(data, validate=True))
            except binascii.Error as error:
                problem = f"the {kind}'s bytes are not base64 ({error})"
                raise BadSampleError(where, "bad_type", problem, "Export them as base64.") from error
        if isinstance(entry.get("path"), str):
            return MediaSource(kind=kind, path=entry["path"])
    raise BadSampleError(
        where, "bad_type", f"a {kind} is given as {type(entry).__name__}", "Give a path or {bytes, path}."
    )


def load_medium(source: MediaSource, root: Path | None, where: str) -> tuple[str, bytes]:
    """Extension and bytes of a medium; images in other formats than PNG, JPEG and WebP become PNG.

    Args:
        root: the folder that paths start at; None: the working directory.

    Raises BadSampleError: a path out of the folder, an unreadable file, a format that samples cannot have.
    """
    data, extension = source.data, "mp4"
    if data is None:
        assert source.path is not None
        path = _inside(source.path, root, where)
        extension = path.suffix.lstrip(".").lower()
        data = _read(path, source.kind, where)
    if source.kind == IMAGE:
        return storable_image(data, where, max_pixels=_LIMITS.max_pixels_hard_limit)
    if kind_of(extension) != VIDEO or video_container(data) is None:
        problem = f"video {source.path or ''} is not an MP4, QuickTime, Matroska, WebM or AVI file"
        raise BadSampleError(where, "unknown_format", problem, "Store it as MP4.")
    return extension, data


@dataclass(kw_only=True)
class OwnMedia:
    """The images and videos of a user's own rows."""

    image_fields: tuple[str, ...] = ("image", "images")
    video_fields: tuple[str, ...] = ("video", "videos")
    root: Path | None = None
    """The folder that paths start at; None: that of the file which names them."""
    _decoded: set[str] = field(default_factory=set)
    """Hashes of what has been decoded without complaint."""

    @property
    def fields(self) -> tuple[str, ...]:
        """All fields that hold media."""
        return (*self.image_fields, *self.video_fields)

    def sources(self, row: Mapping[str, Any], where: str) -> list[MediaSource]:
        """The media that the row's fields name, one or several in each, images first."""
        return [
            medium_source(entry, kind, where)
            for kind, names in ((IMAGE, self.image_fields), (VIDEO, self.video_fields))
            for name in names
            for entry in _listed(row.get(name))
        ]

    def beside(self, row: Mapping[str, Any]) -> Iterator[str]:
        """What stands beside the path or the bytes of a medium (``image.caption``), which no sample keeps."""
        for name in self.fields:
            for entry in _listed(row.get(name)):
                if isinstance(entry, Mapping):
                    others = (key for key in entry if key not in ("bytes", "path"))
                    yield from (f"{name}.{key}" for key in others if entry[key] not in (None, "", [], {}))

    def members(self, sources: Sequence[MediaSource], file: Path, where: str) -> dict[str, bytes]:
        """Members of a sample by extension: ``0.png``, ``1.jpg``, ``0.mp4``; each was decoded once.

        Raises BadSampleError: as ``load_medium``, ``decode_image`` and ``decode_video``.
        """
        members: dict[str, bytes] = {}
        count = {IMAGE: 0, VIDEO: 0}
        for source in sources:
            place = f"{where}, {source.kind} {source.path or count[source.kind]}"
            extension, data = load_medium(source, self.root or file.parent, place)
            self._decode(data, source.kind, place)
            members[f"{count[source.kind]}.{extension}"] = data
            count[source.kind] += 1
        return members

    def _decode(self, data: bytes, kind: str, where: str) -> None:
        key = content_hash(data)
        if key in self._decoded:
            return
        if kind == IMAGE:
            decode_image(data, where, max_pixels=_LIMITS.max_pixels_hard_limit)
        else:
            decode_video(data, where, _LIMITS)
        self._decoded.add(key)


def with_named_media(prompt: Any, where: str) -> tuple[Any, list[MediaSource]]:
    """A prompt whose chat parts name their media (``{"type": "image", "image": "a.png"}``) as one of plain
    placeholders, and what they name, images first. Other prompts as they are."""
    if not isinstance(prompt, list):
        return prompt, []
    found: list[MediaSource] = []

    def plain(part: Any) -> Any:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in (IMAGE, VIDEO) or part.get(kind) is None:
            return part
        found.append(medium_source(part[kind], kind, where))
        return {name: value for name, value in part.items() if name != kind}

    messages = [
        {**message, "content": [plain(part) for part in message["content"]]}
        if isinstance(message, Mapping) and isinstance(message.get("content"), list)
        else message
        for message in prompt
    ]
    return messages, sorted(found, key=lambda source: source.kind)  # image, video


def check_placeholders(prompt: Any, sources: Sequence[MediaSource], where: str) -> None:
    """Raises BadSampleError (``media_mismatch``) unless the prompt has a placeholder for each medium, or none
    at all: then the media go in front. Placeholders are ``<image>`` and ``<video>`` in texts, and parts of
    chat messages."""
    shown = list(texts_and_media(prompt))
    placed = {
        kind: sum(int(part == kind) or text.count(f"<{kind}>") for part, text in shown)
        for kind in (IMAGE, VIDEO)
    }
    given = {kind: sum(source.kind == kind for source in sources) for kind in (IMAGE, VIDEO)}
    parts = any(part != "text" for part, _ in shown)
    if placed == given or (not any(placed.values())) or (not sources and not parts):
        return
    wrong = [f"{placed[k]} {k} placeholder(s) for {given[k]} {k}(s)" for k in placed if placed[k] != given[k]]
    raise BadSampleError(
        where,
        "media_mismatch",
        f"the prompt has {' and '.join(wrong)}",
        "Write one placeholder for each, or none to put the media in front.",
    )


def _listed(value: Any) -> list[Any]:
    """One medium or several as a list."""
    if value in (None, "", [], {}):
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _inside(name: str, root: Path | None, where: str) -> Path:
    """The file that a row names. Raises BadSampleError for one outside the media folder."""
    inner = os.path.normpath(name)
    if os.path.isabs(inner) or inner.split(os.sep)[0] == "..":
        raise BadSampleError(
            where,
            "missing_media",
            f"the path {name!r} leads out of the media folder",
            "Give paths relative to --media-root.",
        )
    folder = root or Path()
    path = folder / inner
    try:
        stays = path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError) as error:  # a null byte, a name that is too long, links in a circle
        problem = f"the path {name[:200]!r} cannot be followed ({error})"
        raise BadSampleError(where, "missing_media", problem, "Give the file's path.") from error
    if not stays:
        raise BadSampleError(
            where,
            "missing_media",
            f"the path {name!r} is a link that leads out of the media folder",
            "Copy the file there, or name the folder that the link leads to with --media-root.",
        )
    return path


def _read(path: Path, kind: str, where: str) -> bytes:
    try:
        return read_regular(path, MAX_BYTES[kind])
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise BadSampleError(
            where,
            "missing_media",
            f"{kind} {path} cannot be read ({name_and_text(error)})",
            "Unpack the set's archives and name their folder with --media-root.",
        ) from error
