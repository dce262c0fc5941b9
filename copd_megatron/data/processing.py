"""A Hugging Face processor, run once per image or video, prepares what both trainer and rollouts see.

An item (one image, one video) becomes ``ItemFeatures``: patches, grid, and the tokens that replace its
placeholder. The same arrays go to the Megatron actor (``MediaFeatures``) and to vLLM
(``rollout.media.engine_input``), so that neither pixels nor placeholder counts can differ.

Prompts name media by ``<image>`` and ``<video>`` in their text, or by chat parts ``{"type": "image"}`` and
``{"type": "video"}``. What the chat template writes for a part holds one placeholder token, which is
replaced by the item's tokens: for Qwen3-VL one ``<|image_pad|>`` per merged patch, and for videos, per
temporal patch, ``<0.5 seconds><|vision_start|><|video_pad|>...<|vision_end|>``. Template and expansion are
those of the installed processor; a test compares with the processor's own end-to-end call.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from copd_megatron.config.schema import MediaConfig
from copd_megatron.data.decode import (
    PixelArray,
    Reserve,
    VideoFrames,
    decode_image,
    decode_video,
    unbounded,
)
from copd_megatron.data.failures import any_failure, template_memory
from copd_megatron.data.media import IMAGE, VIDEO
from copd_megatron.data.model_files import load_processor
from copd_megatron.data.samples import Message, texts_and_media
from copd_megatron.errors import BadSampleError, DataError
from copd_megatron.records import FloatArray, IntArray

_MARKER = re.compile(r"(<image>|<video>)")
_KIND_OF_MARKER = {"<image>": IMAGE, "<video>": VIDEO}


@dataclass(frozen=True, kw_only=True)
class ItemFeatures:
    """One processed image or video. Legend: ``n`` patches, ``d`` values of a patch (channels x temporal
    patch x patch height x patch width)."""

    kind: str
    """``image`` or ``video``."""
    pixel_values: FloatArray
    """[n, d]"""
    grid_thw: IntArray
    """[3] patches along time, height, width; n is their product."""
    replacement_ids: IntArray
    """The tokens that replace the one placeholder token in the prompt."""
    timestamps: tuple[float, ...] = ()
    """Seconds of each temporal patch of a video."""

    @property
    def nbytes(self) -> int:
        return self.pixel_values.nbytes + self.grid_thw.nbytes + self.replacement_ids.nbytes

    @cached_property
    def pixel_hash(self) -> str:
        """Hash of patches and grid; equal for two engines that see the same item."""
        return pixel_hash(self.pixel_values, self.grid_thw)


def pixel_hash(pixel_values: FloatArray, grid_thw: npt.NDArray[Any]) -> str:
    """BLAKE2b (16 bytes, hexadecimal) of one item's float32 patches [n, d] and grid [3]."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(np.asarray(grid_thw, dtype=np.int64).tobytes())
    digest.update(np.ascontiguousarray(pixel_values, dtype=np.float32).data)
    return digest.hexdigest()


class Placed(Protocol):
    """What a prompt's text is made of, of a medium; see ``ItemFeatures``."""

    @property
    def kind(self) -> str: ...
    @property
    def replacement_ids(self) -> IntArray: ...


@dataclass(frozen=True, kw_only=True)
class MediaFeatures:
    """All processed media of one prompt, in the order of their placeholders."""

    items: tuple[ItemFeatures, ...]

    @property
    def pixel_values(self) -> FloatArray | None:
        """[sum of image patches, d]; None without images."""
        return self._pixels(IMAGE)

    @property
    def image_grid_thw(self) -> IntArray | None:
        """[images, 3]"""
        return self._grids(IMAGE)

    @property
    def pixel_values_videos(self) -> FloatArray | None:
        """[sum of video patches, d]; None without videos."""
        return self._pixels(VIDEO)

    @property
    def video_grid_thw(self) -> IntArray | None:
        """[videos, 3]"""
        return self._grids(VIDEO)

    @property
    def pixel_hash(self) -> str:
        """Hash over the items' hashes, in order."""
        return hashlib.blake2b(
            "".join(item.pixel_hash for item in self.items).encode(), digest_size=16
        ).hexdigest()

    def _pixels(self, kind: str) -> FloatArray | None:
        parts = [item.pixel_values for item in self.items if item.kind == kind]
        if len(parts) > 1:
            return np.concatenate(parts)
        return parts[0] if parts else None

    def _grids(self, kind: str) -> IntArray | None:
        parts = [item.grid_thw for item in self.items if item.kind == kind]
        return np.stack(parts) if parts else None


@dataclass(frozen=True, kw_only=True)
class Placeholder:
    """The position of one item in an expanded prompt."""

    item: ItemFeatures
    offset: int
    """Of the first replacement token in the prompt."""

    @property
    def length(self) -> int:
        """Number of replacement tokens, including the time stamps of a video."""
        return len(self.item.replacement_ids)


class MultimodalProcessor:
    """A Hugging Face vision-language processor (``Qwen3VLProcessor``) with this run's limits.

    Threads may share one. Raises DataError if the processor lacks a part that is needed.
    """

    def __init__(self, processor: Any, config: MediaConfig) -> None:
        needed = ("image_processor", "video_processor", "tokenizer", "replace_image_token", "image_token")
        missing = [name for name in needed if not hasattr(processor, name)]
        if missing:
            raise DataError(
                f"{type(processor).__name__} lacks {', '.join(missing)}, which a vision-language model's "
                "processor has. Point model.path at a folder with preprocessor and tokenizer files of a "
                "Qwen3-VL model, saved by transformers 5.10 or newer."
            )
        self.config = config
        self.tokenizer = processor.tokenizer
        self._processor = processor
        self._pads = {IMAGE: int(processor.image_token_id), VIDEO: int(processor.video_token_id)}
        self._sizes = {
            IMAGE: _size(processor.image_processor, config.image_min_pixels, config.image_max_pixels),
            VIDEO: _size(processor.video_processor, config.video_min_pixels, config.video_max_pixels),
        }

    @classmethod
    def from_folder(cls, folder: str | Path, config: MediaConfig) -> MultimodalProcessor:
        """The processor saved in a model folder. Raises as ``load_processor``."""
        return cls(load_processor(folder), config)

    @property
    def image_token_id(self) -> int:
        return self._pads[IMAGE]

    @property
    def video_token_id(self) -> int:
        return self._pads[VIDEO]

    @property
    def sizes(self) -> dict[str, dict[str, int]]:
        """The pixel budgets in force, by kind: ``shortest_edge`` and ``longest_edge``, which is what
        processors call the smallest and largest number of pixels."""
        return {kind: dict(size) for kind, size in self._sizes.items()}

    @property
    def budgets_changed(self) -> bool:
        """Whether the configuration overrides the processor's own pixel budgets."""
        config = self.config
        bounds = (config.image_min_pixels, config.image_max_pixels)
        return any(bound is not None for bound in (*bounds, config.video_min_pixels, config.video_max_pixels))

    # ---- items -----------------------------------------------------------------------------------------

    def decode_and_process(
        self, kind: str, data: bytes, where: str, reserve: Reserve = unbounded
    ) -> ItemFeatures:
        """An encoded file to features. Raises BadSampleError, whatever goes wrong.

        ``reserve``: called with the number of pixels before they are decoded, see ``PixelBudget``.
        """
        with any_failure(where):
            if kind == IMAGE:
                limit = self.config.max_pixels_hard_limit
                return self.process_image(decode_image(data, where, max_pixels=limit, reserve=reserve), where)
            return self.process_video(decode_video(data, where, self.config, reserve=reserve), where)

    def process_image(self, image: PixelArray, where: str) -> ItemFeatures:
        """Features of [H, W, 3] RGB. Raises BadSampleError (``bad_size``)."""
        try:
            out = self._processor.image_processor(
                images=[image],
                size=self._sizes[IMAGE],
                input_data_format="channels_last",
                return_tensors="np",
            )
        except ValueError as error:
            raise _bad_size(where, image.shape, error) from error
        replacement = self._processor.replace_image_token(out, 0)
        return self._item(IMAGE, out["pixel_values"], out["image_grid_thw"][0], replacement, ())

    def process_video(self, video: VideoFrames, where: str) -> ItemFeatures:
        """Features of sampled frames. Raises BadSampleError (``bad_size``)."""
        from transformers.video_utils import VideoMetadata

        try:
            out = self._processor.video_processor(
                videos=[video.frames],
                video_metadata=[VideoMetadata(**video.metadata())],
                do_sample_frames=False,
                size=self._sizes[VIDEO],
                input_data_format="channels_last",
                return_metadata=True,
                return_tensors="np",
            )
        except ValueError as error:
            raise _bad_size(where, video.frames.shape, error) from error
        replacement = self._processor.replace_video_token(out, 0)
        grid = out["video_grid_thw"][0]
        timestamps = _timestamps(video, int(grid[0]))
        return self._item(VIDEO, out["pixel_values_videos"], grid, replacement, timestamps)

    def _item(
        self,
        kind: str,
        pixel_values: npt.NDArray[Any],
        grid: npt.NDArray[Any],
        replacement: str,
        timestamps: tuple[float, ...],
    ) -> ItemFeatures:
        ids = self.tokenizer(replacement, add_special_tokens=False)["input_ids"]
        item = ItemFeatures(
            kind=kind,
            pixel_values=np.ascontiguousarray(pixel_values, dtype=np.float32),
            grid_thw=np.asarray(grid, dtype=np.int32),
            replacement_ids=np.asarray(ids, dtype=np.int32),
            timestamps=timestamps,
        )
        # Read-only, since the cache hands the same arrays to all that ask.
        for array in (item.pixel_values, item.grid_thw, item.replacement_ids):
            array.flags.writeable = False
        return item

    # ---- prompts ---------------------------------------------------------------------------------------

    def parts(
        self, prompt: str | Sequence[Message], kinds: Sequence[str], where: str
    ) -> list[dict[str, Any]]:
        """A prompt as chat messages whose contents are lists of typed parts.

        ``kinds``: ``image`` or ``video`` for each medium of the sample, in order within a kind. ``<image>``
        and ``<video>`` in texts become parts; in a prompt without any placeholder, all media go in front of
        the first user message. Parts keep their other fields (``{"type": "image", "image": "1.png"}``).

        Raises BadSampleError (``media_mismatch``) if the numbers of placeholders and media differ.
        """
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        split = [{**message, "content": list(_split(message["content"]))} for message in messages]
        placed = [part["type"] for message in split for part in message["content"] if _is_medium(part)]
        if not placed and kinds:
            first = next((message for message in split if message["role"] == "user"), split[0])
            first["content"] = [*({"type": kind} for kind in kinds), *first["content"]]
            placed = list(kinds)
        named = any(
            isinstance(part.get(part["type"]), str)
            for message in split
            for part in message["content"]
            if _is_medium(part)
        )
        for kind in (IMAGE, VIDEO):
            if not named and placed.count(kind) != list(kinds).count(kind):
                raise BadSampleError(
                    where,
                    "media_mismatch",
                    f"the prompt has {placed.count(kind)} {kind} placeholder(s), the sample "
                    f"{list(kinds).count(kind)} {kind} member(s)",
                    "Write one placeholder per member, or none at all to put the media in front.",
                )
        return split

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        items: Sequence[Placed],
        where: str,
        system_prompt: str | None = None,
    ) -> IntArray:
        """[P] token ids of messages (as ``parts`` gives them), placeholders expanded by ``items`` in order.

        With a chat template, system message and generation prompt are as in ``stream.encode_prompt``.
        Without one, the texts of all parts are concatenated, with media between vision markers.

        Raises BadSampleError (``media_mismatch``) if the text's placeholder tokens do not match the items.
        """
        unexpanded = self.unexpanded(messages, system_prompt)
        kind_of_pad = {pad: kind for kind, pad in self._pads.items()}
        found = [kind_of_pad[token] for token in unexpanded if token in kind_of_pad]
        if found != [item.kind for item in items]:
            raise BadSampleError(
                where,
                "media_mismatch",
                f"the prompt's text has placeholder tokens for {found}, its media are "
                f"{[item.kind for item in items]}",
                "Remove tokens such as <|image_pad|> from the text.",
            )
        following = iter(items)
        out: list[int] = []
        for token in unexpanded:
            out.extend(next(following).replacement_ids.tolist() if token in kind_of_pad else (token,))
        return np.asarray(out, dtype=np.int32)

    def unexpanded(
        self, messages: Sequence[Mapping[str, Any]], system_prompt: str | None = None
    ) -> list[int]:
        """Token ids with one placeholder token per medium, as vLLM's own processor expects them."""
        template = self._processor.chat_template or getattr(self.tokenizer, "chat_template", None)
        if template is None:
            processor = self._processor
            text = "" if system_prompt is None else f"{system_prompt}\n\n"
            for part in (part for message in messages for part in message["content"]):
                pad = {IMAGE: processor.image_token, VIDEO: processor.video_token}.get(part["type"])
                text += (
                    part["text"]
                    if pad is None
                    else processor.vision_start_token + pad + processor.vision_end_token
                )
        else:
            conversation = [dict(message) for message in messages]
            if system_prompt is not None and conversation[0]["role"] != "system":
                content = [{"type": "text", "text": system_prompt}]
                conversation.insert(0, {"role": "system", "content": content})
            with template_memory():
                text = self._processor.apply_chat_template(
                    conversation, chat_template=template, add_generation_prompt=True, tokenize=False
                )
        return list(self.tokenizer(text, add_special_tokens=template is None)["input_ids"])

    def placeholders(self, token_ids: IntArray, features: MediaFeatures) -> list[Placeholder]:
        """The position of each item of ``features`` in the expanded prompt (or prompt and response).

        Raises ValueError if features and tokens do not belong together.
        """
        return find_placeholders(token_ids, features, self.image_token_id, self.video_token_id)


def find_placeholders(
    token_ids: IntArray, features: MediaFeatures, image_token_id: int, video_token_id: int
) -> list[Placeholder]:
    """See ``MultimodalProcessor.placeholders``."""
    pads = {IMAGE: image_token_id, VIDEO: video_token_id}
    positions = np.flatnonzero((token_ids == image_token_id) | (token_ids == video_token_id))
    placeholders: list[Placeholder] = []
    cursor = 0
    for item in features.items:
        inside = np.flatnonzero(item.replacement_ids == pads[item.kind])
        if cursor + len(inside) <= len(positions):
            offset = int(positions[cursor] - inside[0])
            span = token_ids[offset : offset + len(item.replacement_ids)]
            if offset >= 0 and np.array_equal(span, item.replacement_ids):
                placeholders.append(Placeholder(item=item, offset=offset))
                cursor += len(inside)
                continue
        raise ValueError(
            f"{item.kind} {len(placeholders)} of the prompt, with grid {item.grid_thw.tolist()}, does not "
            "match the placeholder tokens: features and tokens belong to different prompts or settings."
        )
    if cursor != len(positions):
        raise ValueError(
            f"{len(positions)} placeholder tokens for media of {cursor}: features are missing for some."
        )
    return placeholders


def _split(content: Any) -> Iterator[dict[str, Any]]:
    """Typed parts of a message's content; ``<image>`` and ``<video>`` in texts become parts."""
    pieces = [{"type": "text", "text": content}] if isinstance(content, str) else content
    for piece in pieces:
        if piece.get("type") != "text":
            yield dict(piece)
            continue
        for text in _MARKER.split(piece["text"]):
            if text in _KIND_OF_MARKER:
                yield {"type": _KIND_OF_MARKER[text]}
            elif text:
                yield {"type": "text", "text": text}


def media_named_in(prompt: str | Sequence[Message]) -> list[str]:
    """The kinds of media that a prompt shows by parts or by ``<image>`` and ``<video>``, in order."""
    named: list[str] = []
    for kind, text in texts_and_media(prompt):
        named += [kind] if kind != "text" else [_KIND_OF_MARKER[mark] for mark in _MARKER.findall(text)]
    return named


def _is_medium(part: Mapping[str, Any]) -> bool:
    return part.get("type") in (IMAGE, VIDEO)


def _size(processor: Any, least: int | None, most: int | None) -> dict[str, int]:
    """The processor's pixel budget, with this run's bounds applied."""
    size = processor.size
    shortest = int(size["shortest_edge"]) if least is None else least
    longest = int(size["longest_edge"]) if most is None else most
    if shortest > longest:
        raise DataError(
            f"the least number of pixels, {shortest}, exceeds the most, {longest}, of "
            f"{type(processor).__name__}. Set both bounds in media.*_min_pixels and media.*_max_pixels."
        )
    return {"shortest_edge": shortest, "longest_edge": longest}


def _timestamps(video: VideoFrames, count: int) -> tuple[float, ...]:
    """Mean time of the first and last frame of each temporal patch, in seconds."""
    indices = list(video.frames_indices)
    width = -(-len(indices) // count)
    indices += indices[-1:] * (count * width - len(indices))
    return tuple(
        (indices[i] / video.fps + indices[i + width - 1] / video.fps) / 2
        for i in range(0, len(indices), width)
    )


def _bad_size(where: str, shape: tuple[int, ...], error: ValueError) -> BadSampleError:
    return BadSampleError(
        where,
        "bad_size",
        f"the processor refuses pixels of shape {list(shape)} ({error})",
        "Drop the sample, or store it larger or less elongated.",
    )
