"""Damaged media, samples and tar files at random: whatever is read is decoded, skipped or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from copd_megatron.data import BadSampleError, DataError
from copd_megatron.data.decode import decode_image, decode_video
from copd_megatron.data.shards import index_shard
from copd_megatron.tiny.tasks.encode import png
from tests.support.fuzzing import LONG, SHORT, damaged
from tests.support.hostile_media import (
    MALFORMED_EXIF,
    clip,
    encoded,
    jpeg_with_exif,
    noise_video,
    picture,
    sample_json,
    tar_of,
    write_tar,
)
from tests.support.vision_streams import CONFIG

LIMIT = 10**7


IMAGES = [
    png(picture(24, 20)),
    encoded(Image.fromarray(picture(24, 20)).quantize(40), "PNG", transparency=3),
    encoded(Image.fromarray(picture(24, 20)), "WEBP"),
    jpeg_with_exif(*MALFORMED_EXIF["no integer"]),
]
VIDEOS = [clip(4, 32), noise_video("matroska", 4), noise_video("avi", 4), noise_video("mov", 4)]


def fuzz_image(data: st.DataObject) -> None:
    encoded_image = damaged(data, data.draw(st.sampled_from(IMAGES)))
    try:
        assert decode_image(encoded_image, "x", max_pixels=LIMIT).shape[2] == 3
    except BadSampleError as error:
        assert error.reason in ("corrupt_image", "too_many_pixels")


def fuzz_video(data: st.DataObject) -> None:
    encoded_video = damaged(data, data.draw(st.sampled_from(VIDEOS)))
    try:
        video = decode_video(encoded_video, "x", CONFIG)
    except BadSampleError as error:
        allowed = ("corrupt_video", "truncated_video", "too_many_pixels", "bad_size", "unknown_format")
        assert error.reason in allowed
    else:
        assert len(video.frames) == len(video.frames_indices) <= CONFIG.max_frames
        assert video.frames.size <= 3 * CONFIG.max_pixels_hard_limit


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["type", "text", "image", "role", "content", "video", "x"]), inner)
    ),
    max_leaves=12,
)
PARTS = st.lists(
    st.fixed_dictionaries(
        {"type": st.sampled_from(["text", "image", "video"]) | JSON},
        optional={"text": st.text() | JSON, "image": JSON},
    )
    | JSON
)
PROMPTS = (
    JSON
    | st.text()
    | st.lists(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "system"]) | JSON, "content": PARTS | st.text() | JSON}
        )
    )
)


def fuzz_prompt(data: st.DataObject, vision_stream: Any) -> None:
    prompt = data.draw(PROMPTS)
    media = data.draw(st.sampled_from([{}, {"0.png": png(picture(32, 32))}, {"txt": b"x"}]))
    reader = vision_stream({"a": (prompt, media)}).reader
    prompt_read = reader.read(0)
    if prompt_read is None:
        assert reader.skipped and "unexpected" not in reader.skipped, reader.skipped
    else:
        assert len(prompt_read.token_ids) and bool(prompt_read.media) == ("0.png" in media)


WHOLE_TAR = tar_of([("a.json", sample_json()), ("n" * 120 + ".json", sample_json()), ("a.0.png", b"x" * 700)])


def fuzz_tar(data: st.DataObject, path: Path) -> None:
    raw = bytearray(damaged(data, WHOLE_TAR, places=3))
    for begin in range(0, len(raw) - 511, 512):  # a damaged header with a right checksum
        if raw[begin + 257 : begin + 262] == b"ustar" and data.draw(st.booleans()):
            raw[begin + 148 : begin + 156] = b" " * 8
            raw[begin + 148 : begin + 156] = b"%06o\0 " % sum(raw[begin : begin + 512])
    try:
        index = index_shard(write_tar(path, bytes(raw)))
    except DataError:
        return
    for members in index.samples.values():
        assert all(0 <= member.offset <= member.offset + member.size <= len(raw) for member in members)


@SHORT
@given(st.data())
def test_damaged_images_are_decoded_or_refused(data: st.DataObject) -> None:
    fuzz_image(data)


@SHORT
@given(st.data())
def test_damaged_videos_are_decoded_or_refused(data: st.DataObject) -> None:
    fuzz_video(data)


@SHORT
@given(st.data())
def test_any_prompt_is_read_or_skipped(vision_stream: Any, data: st.DataObject) -> None:
    fuzz_prompt(data, vision_stream)


@SHORT
@given(st.data())
def test_damaged_tars_are_indexed_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    fuzz_tar(data, tmp_path / "s.tar")


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("fuzz", [fuzz_image, fuzz_video, fuzz_prompt, fuzz_tar])
def test_long_fuzzing(fuzz: Any, vision_stream: Any, tmp_path: Path) -> None:
    more: dict[Any, tuple[Any, ...]] = {fuzz_prompt: (vision_stream,), fuzz_tar: (tmp_path / "f.tar",)}

    @LONG
    @given(st.data())
    def run(data: st.DataObject) -> None:
        fuzz(data, *more.get(fuzz, ()))

    run()
