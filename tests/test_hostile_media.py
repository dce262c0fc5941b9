"""Images and videos as people have them: decoded right, or refused by name, within bounded memory."""

from __future__ import annotations

import contextlib
import io
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image, ImageOps

from copd_megatron.config import MediaConfig
from copd_megatron.data.decode import PixelBudget, decode_image, decode_video
from copd_megatron.data.decode import image as image_module
from copd_megatron.data.decode.video import open_alone
from copd_megatron.data.processing import MultimodalProcessor
from copd_megatron.tiny.tasks.encode import mp4
from tests.support.hostile_media import (
    MALFORMED_EXIF,
    NOT_IMAGES,
    NOT_VIDEOS,
    changing_size,
    clip,
    encoded,
    jpeg,
    jpeg_with_exif,
    noise_video,
    picture,
    refused,
    video_of_packets,
    without_decoder,
)
from tests.support.vision_streams import CONFIG

LIMIT = 10**7


def refused_image(data: bytes) -> str:
    return refused(lambda: decode_image(data, "shard s", max_pixels=LIMIT))


def refused_video(data: bytes, config: MediaConfig = CONFIG) -> str:
    return refused(lambda: decode_video(data, "shard s", config))


# ---------------------------------------------------------------- images


@pytest.mark.parametrize("kind", NOT_IMAGES)
def test_what_is_no_image_is_named(kind: str) -> None:
    assert refused_image(NOT_IMAGES[kind]) == "corrupt_image"


@pytest.mark.parametrize("kind", MALFORMED_EXIF)
def test_malformed_exif_leaves_the_orientation_readable(kind: str) -> None:
    data = jpeg_with_exif(*MALFORMED_EXIF[kind])
    with (
        Image.open(io.BytesIO(data)) as stored,
        pytest.raises((TypeError, AttributeError, ValueError, struct.error)),
    ):
        ImageOps.exif_transpose(stored)  # what makes these malformed
    assert decode_image(data, "x", max_pixels=LIMIT).shape == (8, 6, 3)


def whole_at_once(data: bytes) -> np.ndarray:
    """The plain way, which holds several copies of the picture."""
    with Image.open(io.BytesIO(data)) as stored:
        stored.load()
        upright = ImageOps.exif_transpose(stored)
        if upright.has_transparency_data:
            with_alpha = upright.convert("RGBA")
            white = Image.new("RGBA", with_alpha.size, (255, 255, 255, 255))
            upright = Image.alpha_composite(white, with_alpha)
        return np.array(upright.convert("RGB"))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("strip_pixels", [1, 200, 1 << 20])
def test_strips_give_the_whole_picture(form: str, strip_pixels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_module, "_STRIP_PIXELS", strip_pixels)
    colour, alpha = Image.fromarray(picture(13, 17)), Image.fromarray(picture(13, 17, 1)[..., 0])
    clear, clear_grey = colour.copy(), colour.convert("L")
    clear.putalpha(alpha)
    clear_grey.putalpha(alpha)
    images: list[tuple[Image.Image, dict[str, Any]]] = [
        *((colour.convert(mode), {}) for mode in ("RGB", "L", "1", "CMYK", "YCbCr")),
        *((image, {}) for image in (clear, clear_grey, colour.quantize(200), clear.quantize(30))),
        (colour.quantize(9), {"transparency": 3}),
        (colour.quantize(9), {"transparency": bytes(range(0, 90, 10))}),
        (colour, {"transparency": tuple(picture(13, 17)[2, 3].tolist())}),
    ]
    seen = 0
    for image, options in images:
        for orientation in range(10):  # 0 and 9 mean nothing
            exif = Image.Exif()
            exif[0x0112] = orientation
            try:
                data = encoded(image, form, exif=exif, **options)
            except (OSError, ValueError, TypeError):  # the format has no such mode
                continue
            assert np.array_equal(decode_image(data, "x", max_pixels=LIMIT), whole_at_once(data))
            seen += 1
    assert seen >= 40


def test_sixteen_bits_of_grey_are_scaled_not_clipped() -> None:
    deep = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    decoded = decode_image(encoded(Image.fromarray(deep), "PNG"), "x", max_pixels=LIMIT)
    assert np.array_equal(decoded, np.stack([deep >> 8] * 3, axis=-1))
    seen_through = encoded(Image.fromarray(deep), "PNG", transparency=int(deep[3, 3]))
    decoded = decode_image(seen_through, "x", max_pixels=LIMIT)
    assert (decoded[3, 3] == 255).all() and decoded[3, 4, 0] == deep[3, 4] >> 8


def test_a_palette_costs_no_copies_of_its_pixels() -> None:
    script = (
        "import resource\n"
        "from copd_megatron.data.decode import decode_image\n"
        "from tests.support.hostile_media import palette_png\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "data = palette_png(6000)\n"
        "before = peak()\n"
        "pixels = decode_image(data, 'x', max_pixels=10**8)\n"
        "assert (pixels[::50, ::50] == (255, 127, 127)).all()\n"
        "print((peak() - before) / pixels.size * 3)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert float(done.stdout) < 6.0, "bytes a pixel; the result has 3, the palette's numbers 1"


# ---------------------------------------------------------------- videos


@pytest.mark.parametrize("kind", NOT_VIDEOS)
def test_what_is_no_video_is_named_and_opens_nothing(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "beside.mp4").write_bytes(clip())
    begin = time.monotonic()
    assert refused_video(NOT_VIDEOS[kind]) == "corrupt_video"
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize(("demuxer", "kind"), [("concat", "list of files"), ("sdp", "session")])
def test_even_a_list_of_files_could_open_none(
    demuxer: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "beside.mp4").write_bytes(clip())
    with pytest.raises((av.FFmpegError, ValueError)):
        open_alone(NOT_VIDEOS[kind], demuxer, LIMIT)


@pytest.mark.parametrize("form", ["matroska", "mov", "mp4"])
def test_a_changing_frame_size_is_refused(form: str) -> None:
    assert refused_video(changing_size((64, 64), (32, 64), form=form)) == "bad_size"
    assert refused_video(changing_size((64, 64), (64, 32), form=form)) == "bad_size"
    assert decode_video(changing_size((64, 48), (64, 48), form=form), "x", CONFIG).frames.shape[1:] == (
        64,
        48,
        3,
    )


def test_frames_beyond_the_limit_are_not_decoded() -> None:
    # the header says 64 x 64; the codec itself refuses what no allowed video has
    assert refused_video(changing_size((64, 64), (9000, 9000), each=2)) == "corrupt_video"
    small_header = video_of_packets([jpeg(400, 400)] * 8, size=(64, 64))
    assert refused_video(small_header) in ("too_many_pixels", "corrupt_video")
    honest = video_of_packets([jpeg(400, 400)] * 8, size=(400, 400))
    assert refused_video(honest) == "too_many_pixels"


def test_endless_frames_of_a_small_file_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = video_of_packets([jpeg(64, 64)] * 300)
    config = MediaConfig(min_frames=2, max_frames=2, max_pixels_hard_limit=2 * 64 * 64)
    assert decode_video(data, "x", config).frames.shape == (2, 64, 64, 3)
    monkeypatch.setattr("copd_megatron.data.decode.video._MAX_DECODED_RATIO", 100)
    assert refused_video(data, config) == "too_many_pixels"


def test_a_codec_without_decoder_is_named() -> None:
    assert refused_video(without_decoder()) == "corrupt_video"


@pytest.mark.parametrize("form", ["matroska", "mov", "mp4", "avi"])
def test_no_prefix_of_a_video_passes_for_whole(form: str) -> None:
    whole = noise_video(form)
    expected = decode_video(whole, "x", CONFIG)
    assert len(expected.frames) == 12
    for end in range(0, len(whole) - 1, len(whole) // 150):
        assert refused_video(whole[:end]) in ("truncated_video", "corrupt_video")
    with_more = decode_video(whole + b"appended by some camera" * 9, "x", CONFIG)
    assert np.array_equal(with_more.frames, expected.frames)


def faststart(data: bytes, path: Path) -> bytes:
    """The same video with its index in front, as files for streaming have it."""
    with (
        av.open(io.BytesIO(data)) as source,
        av.open(str(path), mode="w", format="mp4", options={"movflags": "faststart"}) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    return path.read_bytes()


def test_truncated_videos_are_named(tmp_path: Path) -> None:
    whole = clip(12)
    assert refused_video(whole[: len(whole) // 2]) == "truncated_video"  # its index, at the end, is gone
    indexed = faststart(whole, tmp_path / "indexed.mp4")
    assert decode_video(indexed, "x", MediaConfig(frame_rate=4.0)).frames.shape == (12, 64, 64, 3)
    for part in (0.3, 0.6, 0.97):
        assert refused_video(indexed[: int(len(indexed) * part)]) == "truncated_video"
    damaged = bytearray(indexed)
    for position in range(len(indexed) // 2, len(indexed) // 2 + 3000):
        damaged[position] ^= 0xFF
    assert refused_video(bytes(damaged)) == "corrupt_video"


def corners(orientation: int) -> np.ndarray:
    """[32, 64, 3] with four different corners, as stored for this orientation."""
    upright = Image.fromarray(np.zeros((32, 64, 3), dtype=np.uint8))
    for number, place in enumerate([(0, 0), (48, 0), (0, 16), (48, 16)], start=1):
        upright.paste((60 * number, 0, 0), (*place, place[0] + 16, place[1] + 16))
    return np.asarray(upright)


@pytest.mark.parametrize(
    ("orientation", "matrix"),
    [
        (1, (1, 0, 0, 1)),
        (2, (-1, 0, 0, 1)),
        (3, (-1, 0, 0, -1)),
        (4, (1, 0, 0, -1)),
        (5, (0, 1, 1, 0)),
        (6, (0, 1, -1, 0)),
        (7, (0, -1, -1, 0)),
        (8, (0, -1, 1, 0)),
    ],
)
def test_frames_are_upright_as_images_are(orientation: int, matrix: tuple[int, ...]) -> None:
    stored = corners(orientation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    expected = decode_image(encoded(Image.fromarray(stored), "PNG", exif=exif), "x", max_pixels=LIMIT)
    data = with_matrix(mp4([stored] * 3, 4.0), matrix)
    assert np.array_equal(decode_video(data, "x", CONFIG).frames, np.stack([expected] * 3))


def with_matrix(data: bytes, turn: tuple[int, ...]) -> bytes:
    """The MP4 with a display matrix in its track header."""
    a, b, c, d = (value << 16 for value in turn)
    track = data.index(b"tkhd") + 44
    return data[:track] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + data[track + 36 :]


def test_what_is_turned_by_an_odd_angle_is_refused() -> None:
    tilted = with_matrix(clip(), (1, 1, -1, 1))
    assert refused_video(tilted) == "unknown_format"
    assert len(decode_video(with_matrix(clip(), (0, 0, 0, 0)), "x", CONFIG).frames) == 8


TIMES = [0, 250, 500, 2000, 2250, 2500, 2750, 3000, 5000]
"""Milliseconds at which frames of a variable rate begin; the last is shown for 250 ms."""


@pytest.mark.parametrize("form", ["matroska", "mov"])
def test_times_of_a_variable_frame_rate_are_true(form: str, strict_processor: MultimodalProcessor) -> None:
    levels = [20 + 25 * i for i in range(len(TIMES))]
    data = video_of_packets([jpeg(64, 64, level) for level in levels], form=form, times=TIMES)
    config = MediaConfig(frame_rate=1.0, min_frames=2)
    video = decode_video(data, "x", config)
    assert video.duration == pytest.approx(5.25)
    seconds = [index / video.fps for index in video.frames_indices]
    assert seconds == pytest.approx(np.linspace(0, 5, 5), abs=1e-3)  # evenly spaced in time
    for second, frame in zip(seconds, video.frames, strict=True):
        shown = max(i for i, begin in enumerate(TIMES) if begin <= 1000 * second + 0.5)
        assert abs(frame.mean() - levels[shown]) < 3, f"at {second} s"
    item = strict_processor.process_video(video, "x")
    assert item.timestamps == pytest.approx([0.625, 3.125, 5.0], abs=1e-3)
    assert "<3.1 seconds>" in strict_processor.tokenizer.decode(item.replacement_ids)


def test_frames_that_avi_does_not_repeat_are_no_loss() -> None:
    times = [0, 1, 2, 7, 8, 11]  # of frames of a quarter second; those between repeat the one before
    data = video_of_packets([jpeg(64, 64)] * 6, form="avi", times=times, clock=4)
    video = decode_video(data, "x", MediaConfig(frame_rate=2.0, min_frames=2))
    assert [index / video.fps for index in video.frames_indices] == pytest.approx(
        np.linspace(0, 2.75, 6), abs=1e-3
    )


def test_a_constant_rate_keeps_counting_frames() -> None:
    for form in ("matroska", "mov", "avi"):
        video = decode_video(noise_video(form), "x", CONFIG)
        assert video.fps == 4.0 and video.frames_indices == tuple(range(12))


# ---------------------------------------------------------------- memory of several threads


def test_threads_share_one_budget_of_pixels() -> None:
    budget, lock = PixelBudget(100), threading.Lock()
    at_work: Counter[int] = Counter()
    most: list[int] = []

    def work(pixels: int) -> None:
        with budget.share() as reserve:
            reserve(pixels)
            with lock:
                at_work[threading.get_ident()] = pixels
                most.append(at_work.total())
            time.sleep(0.001)
            with lock:
                del at_work[threading.get_ident()]

    sizes = [100, 30, 60, 40, 10, 100, 5, 70, 30] * 4
    threads = [threading.Thread(target=work, args=(size,)) for size in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(most) == len(sizes) and max(most) <= 100
    assert len([total for total in most if total not in sizes]) > 0, "small ones should run side by side"


def test_a_share_is_given_back_when_decoding_fails() -> None:
    budget = PixelBudget(10)
    for _ in range(3):
        with contextlib.suppress(ValueError), budget.share() as reserve:
            reserve(10)
            raise ValueError
    with budget.share() as reserve:
        reserve(10)
