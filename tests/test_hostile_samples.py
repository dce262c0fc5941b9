"""Whatever a data set holds: bad samples are skipped, counted and named, and reading them ends."""

from __future__ import annotations

import gc
import logging
import struct
import time
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from copd_megatron.data import BadSampleError, DataError, PromptReader, SampleRef, ShardSet
from copd_megatron.data.failures import any_failure
from copd_megatron.data.loader import MediaLoader
from copd_megatron.data.media import MediaPlace
from copd_megatron.data.processing import MultimodalProcessor
from copd_megatron.data.samples import parse_sample
from copd_megatron.data.shards import index_shard
from copd_megatron.tiny.tasks.encode import png
from tests.support.byte_tokenizer import byte_tokenizer
from tests.support.hostile_media import (
    BAD_JSON,
    BAD_PROMPTS,
    BAD_TARS,
    NOT_IMAGES,
    NOT_VIDEOS,
    PICTURES_WITHOUT_MEMBERS,
    changing_size,
    chat,
    jpeg,
    noise_video,
    picture,
    refused,
    sample_json,
    tar_of,
    without_decoder,
    write_tar,
)
from tests.support.vision_streams import CONFIG

LIMIT = 10**7


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


def test_a_closed_loader_still_answers(tmp_path: Path, strict_processor: MultimodalProcessor) -> None:
    path = write_tar(tmp_path / "s.tar", tar_of([("a.json", sample_json()), ("a.0.png", png(picture()))]))
    place = MediaPlace("x", "s", "a", "0.png")
    loader = MediaLoader(strict_processor, CONFIG)
    loader.register("x", ShardSet.open([str(path)]))
    loader.close()
    loader.prefetch([place])
    assert loader.get(place)[1].kind == "image"


# ---------------------------------------------------------------- JSON and prompts


@pytest.mark.parametrize("kind", BAD_JSON)
def test_bad_json_is_named(kind: str) -> None:
    reason, raw = BAD_JSON[kind]
    assert refused(lambda: parse_sample(raw, SampleRef("s", "k"), "shard s")) == reason


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32-be"])
def test_good_json_is_read_in_every_encoding_of_unicode(encoding: str) -> None:
    raw = sample_json(prompt="3 \u2265 2?").decode().encode(encoding)
    assert parse_sample(raw, SampleRef("s", "k"), "shard s").prompt == "3 \u2265 2?"


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
