"""Whatever a data set holds: bad samples are skipped, counted and named, reading ends, memory is bounded."""

from __future__ import annotations

import contextlib
import gc
import io
import itertools
import logging
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from copd_megatron.config import DataConfig, MediaConfig
from copd_megatron.data import BadSampleError, DataError, PromptReader, PromptStream, SampleRef, ShardSet
from copd_megatron.data.decode import PixelBudget, decode_image, decode_video
from copd_megatron.data.decode import image as image_module
from copd_megatron.data.decode.video import open_alone
from copd_megatron.data.failures import any_failure
from copd_megatron.data.loader import MediaLoader
from copd_megatron.data.media import MediaPlace
from copd_megatron.data.media_prompts import MediaPrompts
from copd_megatron.data.processing import MultimodalProcessor
from copd_megatron.data.samples import parse_sample
from copd_megatron.data.shards import index_shard
from copd_megatron.tiny.tasks.encode import mp4, png
from tests.support.byte_tokenizer import byte_tokenizer
from tests.support.hostile_media import (
    BAD_JSON,
    BAD_PROMPTS,
    BAD_TARS,
    MALFORMED_EXIF,
    NOT_IMAGES,
    NOT_VIDEOS,
    PICTURES_WITHOUT_MEMBERS,
    changing_size,
    chat,
    clip,
    encoded,
    jpeg,
    jpeg_with_exif,
    picture,
    sample_json,
    tar_of,
    video_of_packets,
    without_decoder,
    write_tar,
)
from tests.support.models_vl import make_processor

CONFIG = MediaConfig(frame_rate=4.0, min_frames=2, num_workers=2, max_pixels_hard_limit=10**6)
LIMIT = 10**7


@pytest.fixture(scope="module")
def processor() -> MultimodalProcessor:
    return MultimodalProcessor(make_processor(), CONFIG)


def refused(call: Callable[[], Any]) -> str:
    """The reason for which a call refuses the sample."""
    with pytest.raises(BadSampleError, match="shard s") as error:
        call()
    return error.value.reason


def refused_image(data: bytes) -> str:
    return refused(lambda: decode_image(data, "shard s", max_pixels=LIMIT))


def refused_video(data: bytes, config: MediaConfig = CONFIG) -> str:
    return refused(lambda: decode_video(data, "shard s", config))


# ---------------------------------------------------------------- failures


@pytest.mark.parametrize("error", [TypeError("x"), AttributeError(), RecursionError(), struct.error("y")])
def test_any_exception_is_the_samples_failure(error: Exception) -> None:
    with pytest.raises(BadSampleError, match=type(error).__name__) as caught, any_failure("shard s"):
        raise error
    assert caught.value.reason == "unexpected" and caught.value.__cause__ is error


@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt(), DataError("the shard is gone")])
def test_what_is_not_the_samples_failure_passes(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, any_failure("shard s"):
        raise error
    assert caught.value is error


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


def noise_video(form: str, frames: int = 12) -> bytes:
    packets = [encoded(Image.fromarray(picture(64, 64, i)), "JPEG") for i in range(frames)]
    return video_of_packets(packets, form=form, clock=4)


@pytest.mark.parametrize("form", ["matroska", "mov", "mp4", "avi"])
def test_no_prefix_of_a_video_passes_for_whole(form: str) -> None:
    whole = noise_video(form)
    expected = decode_video(whole, "x", CONFIG)
    assert len(expected.frames) == 12
    for end in range(0, len(whole) - 1, len(whole) // 150):
        assert refused_video(whole[:end]) in ("truncated_video", "corrupt_video")
    with_more = decode_video(whole + b"appended by some camera" * 9, "x", CONFIG)
    assert np.array_equal(with_more.frames, expected.frames)


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
def test_times_of_a_variable_frame_rate_are_true(form: str, processor: MultimodalProcessor) -> None:
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
    item = processor.process_video(video, "x")
    assert item.timestamps == pytest.approx([0.625, 3.125, 5.0], abs=1e-3)
    assert "<3.1 seconds>" in processor.tokenizer.decode(item.replacement_ids)


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


# ---------------------------------------------------------------- the loader


class Failing(MultimodalProcessor):
    """A processor that holds something large when it fails."""

    def __init__(self) -> None:
        self.held: weakref.ref[Any] | None = None

    def decode_and_process(self, *_: Any) -> Any:
        pixels = np.zeros(1000)
        self.held = weakref.ref(pixels)
        try:
            raise TypeError("not foreseen")
        except TypeError as error:
            raise BadSampleError("shard s", "corrupt_image", "bad", "Drop it.") from error


def test_a_cached_failure_keeps_nothing_of_what_failed(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", tar_of([("a.json", sample_json()), ("a.0.png", png(picture()))]))
    failing = Failing()
    with MediaLoader(failing, CONFIG) as loader:
        loader.register("x", ShardSet.open([str(path)]))
        errors = []
        for _ in range(2):
            with pytest.raises(BadSampleError) as caught:
                loader.get(MediaPlace("x", "s", "a", "0.png"))
            errors.append(caught.value)
        assert loader.counters()["failed"] == 1
        assert errors[0] is not errors[1] and str(errors[0]) == str(errors[1])
        del errors, caught
        gc.collect()
        assert failing.held is not None and failing.held() is None


def test_a_closed_loader_still_answers(tmp_path: Path, processor: MultimodalProcessor) -> None:
    path = write_tar(tmp_path / "s.tar", tar_of([("a.json", sample_json()), ("a.0.png", png(picture()))]))
    place = MediaPlace("x", "s", "a", "0.png")
    loader = MediaLoader(processor, CONFIG)
    loader.register("x", ShardSet.open([str(path)]))
    loader.close()
    loader.prefetch([place])
    assert loader.get(place)[1].kind == "image"


# ---------------------------------------------------------------- JSON and prompts


@pytest.mark.parametrize("kind", BAD_JSON)
def test_bad_json_is_named(kind: str) -> None:
    reason, raw = BAD_JSON[kind]
    assert refused(lambda: parse_sample(raw, SampleRef("s", "k"), "shard s")) == reason


def test_nesting_is_judged_the_same_at_any_depth_of_calls() -> None:
    def deeper(calls: int) -> str:
        return (
            deeper(calls - 1)
            if calls
            else refused(
                lambda: parse_sample(
                    BAD_JSON["nested below Python's limit"][1], SampleRef("s", "k"), "shard s"
                )
            )
        )

    assert {deeper(calls) for calls in (0, 100, 600)} == {"too_nested"}


@pytest.mark.parametrize("kind", BAD_PROMPTS)
def test_bad_prompts_are_named(kind: str) -> None:
    reason, prompt = BAD_PROMPTS[kind]
    raw = sample_json(prompt=prompt)
    assert refused(lambda: parse_sample(raw, SampleRef("s", "k"), "shard s")) == reason


def test_fields_of_null_are_as_good_as_absent() -> None:
    # tables have a column for every field of every part
    parts = [
        {"type": "image", "text": None, "image": "0.png"},
        {"type": "text", "text": "What?", "image": None},
    ]
    sample = parse_sample(sample_json(prompt=chat(parts)), SampleRef("s", "k"), "shard s")
    assert sample.prompt[0]["content"] == [  # type: ignore[index]
        {"type": "image", "image": "0.png"},
        {"type": "text", "text": "What?"},
    ]


def test_text_parts_reach_templates_of_text_models(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content if m.content is string else '' }}{% endfor %}"
    parts = chat([{"type": "text", "text": "How "}, {"type": "text", "text": "many?"}])
    path = write_tar(tmp_path / "s.tar", tar_of([("a.json", sample_json(prompt=parts))]))
    tokenizer = byte_tokenizer(chat_template=template)
    reader = PromptReader(ShardSet.open([str(path)]), tokenizer, domain="text", max_prompt_tokens=99)
    prompt = reader.read(0)
    assert prompt is not None and tokenizer.decode(prompt.token_ids) == "How many?"


# ---------------------------------------------------------------- whole shards of bad samples

BAD_MEMBERS: dict[str, tuple[str, dict[str, bytes]]] = {
    **{f"image: {kind}": ("corrupt_image", {"0.png": data}) for kind, data in NOT_IMAGES.items()},
    **{f"video: {kind}": ("corrupt_video", {"mp4": data}) for kind, data in NOT_VIDEOS.items()},
    "changing size": ("bad_size", {"mkv": changing_size((64, 64), (32, 64))}),
    "no decoder": ("corrupt_video", {"mp4": without_decoder()}),
    "cut": ("truncated_video", {"mkv": noise_video("matroska")[:9000]}),
    "large": ("too_many_pixels", {"0.png": png(picture(1001, 1000))}),
    "thin": ("bad_size", {"0.png": png(picture(2, 500))}),
    **{
        f"unknown member: {name}": ("unknown_format", {name: b"x", "1.png": png(picture())})
        for name in ("0.gif", "bmp", "0.heic", "tiff", "mpg", "wav", "npy")
    },
}


@pytest.fixture
def vision_stream(
    tmp_path: Path, processor: MultimodalProcessor
) -> Iterator[Callable[[dict[str, tuple[Any, dict[str, bytes]]]], PromptStream]]:
    """Makes a stream over samples {key: (prompt, members)}."""
    with MediaLoader(processor, CONFIG) as loader:

        def make(samples: dict[str, tuple[Any, dict[str, bytes]]]) -> PromptStream:
            members = []
            for key, (prompt, media) in samples.items():
                members.append((f"{key}.json", sample_json(prompt=prompt)))
                members += [(f"{key}.{extension}", data) for extension, data in media.items()]
            shards = ShardSet.open([str(write_tar(tmp_path / "s.tar", tar_of(members)))])
            return PromptStream.from_config(
                DataConfig(max_prompt_tokens=500),
                processor.tokenizer,
                domain="image",
                seed=3,
                shards=shards,
                media=MediaPrompts(loader, f"image/{next(names)}", shards),
            )

        names = itertools.count()
        yield make


def test_every_bad_medium_is_skipped_counted_and_named(
    vision_stream: Any, caplog: pytest.LogCaptureFixture
) -> None:
    samples: dict[str, Any] = {f"bad{i}": ("What?", bad[1]) for i, bad in enumerate(BAD_MEMBERS.values())}
    samples |= {f"good{i}": ("What?", {"0.jfif": jpeg(64, 64), "txt": b"a note"}) for i in range(3)}
    with caplog.at_level(logging.WARNING):
        stream = vision_stream(samples)
        prompts = stream.next(3)
    assert sorted(prompt.prompt_id for prompt in prompts) == ["s/good0", "s/good1", "s/good2"]
    rest = stream.next(3)  # to the epoch's end and into the next: every bad sample was met
    assert len(rest) == 3 and all(prompt.media for prompt in prompts)
    reasons = Counter(reason for reason, _ in BAD_MEMBERS.values())
    assert set(stream.skipped) == set(reasons)
    assert all(stream.skipped[reason] >= count for reason, count in reasons.items())
    assert "sample 'bad" in caplog.text


def test_every_bad_prompt_beside_an_image_is_skipped(vision_stream: Any) -> None:
    samples: dict[str, Any] = {
        f"bad{i}": (prompt, {"0.png": png(picture())}) for i, (_, prompt) in enumerate(BAD_PROMPTS.values())
    }
    stream = vision_stream({**samples, "good": ("What?", {"0.png": png(picture())})})
    assert [prompt.prompt_id for prompt in stream.next(3)] == ["s/good"] * 3
    assert set(stream.skipped) == {reason for reason, _ in BAD_PROMPTS.values()}


def test_a_picture_that_a_prompt_shows_but_the_sample_lacks_is_a_mismatch(vision_stream: Any) -> None:
    samples = {f"bad{i}": (prompt, {}) for i, prompt in enumerate(PICTURES_WITHOUT_MEMBERS.values())}
    stream = vision_stream({**samples, "good": ("2 < 3 and <images>?", {})})
    assert [prompt.prompt_id for prompt in stream.next(3)] == ["s/good"] * 3
    assert set(stream.skipped) == {"media_mismatch"}
    assert stream.skipped["media_mismatch"] >= 2 * len(samples)


def test_parts_with_pictures_do_not_reach_a_text_model(tmp_path: Path) -> None:
    parts = chat([{"type": "image"}, {"type": "text", "text": "What?"}])
    path = write_tar(tmp_path / "s.tar", tar_of([("a.json", sample_json(prompt=parts))]))
    reader = PromptReader(ShardSet.open([str(path)]), byte_tokenizer(), domain="text", max_prompt_tokens=99)
    assert reader.read(0) is None and reader.skipped == {"media_unsupported": 1}


# ---------------------------------------------------------------- tar files


@pytest.mark.parametrize("kind", BAD_TARS)
def test_bad_tars_are_refused_at_once(kind: str, tmp_path: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(DataError, match=r"s\.tar"):
        index_shard(write_tar(tmp_path / "s.tar", BAD_TARS[kind]))
    assert time.monotonic() - begin < 5


def test_a_name_that_is_not_unicode_can_be_read_and_told_apart(tmp_path: Path) -> None:
    raw = tar_of([("a\u00ff.json", sample_json())]).replace("a\u00ff".encode(), b"a\xff\xfe")
    path = write_tar(tmp_path / "s.tar", fixed_checksum(raw))
    shards = ShardSet.open([str(path)])
    assert len(shards.fingerprint) == 32 and shards.refs[0].id.encode()


def fixed_checksum(tar: bytes) -> bytes:
    head = bytearray(tar[:512])
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head) + tar[512:]


# ---------------------------------------------------------------- fuzzing


def damaged(data: st.DataObject, whole: bytes, places: int = 6) -> bytes:
    """Some bytes changed, and perhaps a piece cut out or doubled; most changes near the headers."""
    out = bytearray(whole)
    for _ in range(data.draw(st.integers(1, places))):
        near = data.draw(st.booleans())
        at = data.draw(st.integers(0, min(len(out), 700 if near else len(out)) - 1))
        out[at] = data.draw(st.sampled_from([0, 1, 0x2D, 0x7F, 0x80, 0xFF, out[at] ^ 1, out[at] ^ 0x10]))
    if data.draw(st.integers(0, 3)) == 0:
        begin, end = sorted(data.draw(st.tuples(st.integers(0, len(out)), st.integers(0, len(out)))))
        out[begin:end] = bytes(out[begin:end]) * data.draw(st.sampled_from([0, 2]))
    return bytes(out)


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


SHORT = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
LONG = settings(max_examples=30_000, deadline=None, suppress_health_check=list(HealthCheck))


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
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("fuzz", [fuzz_image, fuzz_video, fuzz_prompt, fuzz_tar])
def test_long_fuzzing(fuzz: Any, vision_stream: Any, tmp_path: Path) -> None:
    more: dict[Any, tuple[Any, ...]] = {fuzz_prompt: (vision_stream,), fuzz_tar: (tmp_path / "f.tar",)}

    @LONG
    @given(st.data())
    def run(data: st.DataObject) -> None:
        fuzz(data, *more.get(fuzz, ()))

    run()
