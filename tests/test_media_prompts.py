"""Prompts with media: settings, references, prefetch, cache, and samples that do not fit."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from copd_megatron.config import (
    BranchConfig,
    Config,
    ConfigError,
    DataConfig,
    MediaConfig,
    ModelConfig,
    ScheduleConfig,
    validate,
)
from copd_megatron.data import DataError, PromptReader, PromptStream, ShardSet, load_validation
from copd_megatron.data.convert.write import NewSample, write_shards
from copd_megatron.data.loader import MediaLoader
from copd_megatron.data.media import MediaMismatchError, MediaPlace, content_hash, place_of
from copd_megatron.data.media_prompts import MediaPrompts
from copd_megatron.data.media_share import MediaShare
from copd_megatron.data.processing import MultimodalProcessor
from copd_megatron.records import Prompt
from copd_megatron.tiny.tasks.encode import png
from copd_megatron.topology.messages import decode, encode
from tests.support.hostile_media import clip, picture, without_decoder
from tests.support.models_vl import MEDIA


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frame_rate": 0.0}, r"media\.frame_rate: 0\.0 must be above 0"),
        ({"min_frames": 9, "max_frames": 8}, r"media\.max_frames: 8 is below media\.min_frames 9"),
        ({"image_min_pixels": 99, "image_max_pixels": 9}, r"media\.image_min_pixels: 99 exceeds"),
        ({"video_min_pixels": 99, "video_max_pixels": 9}, r"media\.video_min_pixels: 99 exceeds"),
        ({"max_pixels_hard_limit": 0}, r"media\.max_pixels_hard_limit: 0 must be at least 1"),
        ({"num_workers": -1}, r"media\.num_workers: -1 must be at least 0"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    branch = BranchConfig(data=DataConfig(train=["t.tar"], validation=["v.tar"]))
    config = Config(
        model=ModelConfig(path="."),
        branches={"image": branch},
        schedule=ScheduleConfig(opd_steps=0),
        media=MediaConfig(**settings),
    )
    with pytest.raises(ConfigError, match=message):
        validate(config, 1, None)
    config.media = MediaConfig()
    validate(config, 1, None)


# ---- shards, prompts, loader -----------------------------------------------------------------------------


def shards_of(folder: Path, media: list[Mapping[str, bytes]], name: str = "toy") -> ShardSet:
    samples = [
        NewSample(prompt=f"{i}: what?", answer=str(i), verifier="exact", media=members)
        for i, members in enumerate(media)
    ]
    write_shards(samples, folder, name, shard_size=100)
    return ShardSet.open([str(folder / f"{name}-*.tar")])


def many(count: int) -> list[Mapping[str, bytes]]:
    return [
        {"mp4": clip(4, 32, i)} if i % 3 == 2 else {"0.png": png(picture(64, 64, i))} for i in range(count)
    ]


def reader_over(loader: MediaLoader, shards: ShardSet, hf_processor: Any, source: str) -> PromptReader:
    return PromptReader(
        shards,
        hf_processor.tokenizer,
        domain="image",
        max_prompt_tokens=500,
        media=MediaPrompts(loader, source, shards),
    )


def stream_over(
    loader: MediaLoader, shards: ShardSet, hf_processor: Any, *, shuffle: bool = True
) -> PromptStream:
    return PromptStream(reader_over(loader, shards, hf_processor, "image/train"), seed=3, shuffle=shuffle)


def same(first: Prompt, second: Prompt) -> bool:
    return (
        first.prompt_id == second.prompt_id
        and np.array_equal(first.token_ids, second.token_ids)
        and first.media == second.media
    )


def test_prompts_carry_references_not_pixels(
    tmp_path: Path, hf_processor: Any, processor: MultimodalProcessor
) -> None:
    members = {"0.png": png(picture(32, 32, 1)), "1.png": png(picture(64, 64, 2)), "mp4": clip(4, 32)}
    shards = shards_of(tmp_path, [members])
    with MediaLoader(processor, MEDIA) as loader:
        (prompt,) = stream_over(loader, shards, hf_processor).next(1)
        assert [(ref.extension, ref.kind) for ref in prompt.media] == [
            ("0.png", "image"),
            ("1.png", "image"),
            ("mp4", "video"),
        ]
        assert [ref.content_hash for ref in prompt.media] == [content_hash(data) for data in members.values()]
        assert str(prompt.media[1]) == "image/train:toy-000000/000000000.1.png"
        features = loader.features(prompt.media)
        assert features is not None
        assert loader.features(()) is None
        assert [place.length for place in processor.placeholders(prompt.token_ids, features)][:2] == [4, 16]


def test_results_do_not_depend_on_threads_cache_or_announcements(
    tmp_path: Path, hf_processor: Any, processor: MultimodalProcessor
) -> None:
    shards = shards_of(tmp_path, many(24))
    seen = []
    for num_workers, cache_bytes in ((0, 0), (1, 2**30), (4, 2**30), (3, 300_000)):
        config = dataclasses.replace(MEDIA, num_workers=num_workers, cache_bytes=cache_bytes)
        with MediaLoader(processor, config) as loader:
            stream = stream_over(loader, shards, hf_processor)
            prompts = stream.next(10) + stream.next(7) + stream.next(13)
            hashes = [features.pixel_hash for p in prompts if (features := loader.features(p.media))]
            seen.append((prompts, hashes))
            counters = loader.counters()
            assert counters["held_bytes"] <= max(cache_bytes, 100_000)
            assert (counters["evictions"] > 0) == (cache_bytes < 2**30)
    for prompts, hashes in seen[1:]:
        assert all(same(a, b) for a, b in zip(prompts, seen[0][0], strict=True))
        assert hashes == seen[0][1] and len(hashes) == 30


def test_the_next_batch_is_decoded_ahead(
    tmp_path: Path, hf_processor: Any, processor: MultimodalProcessor
) -> None:
    shards = shards_of(tmp_path, many(12))
    with MediaLoader(processor, MEDIA) as loader:
        stream = stream_over(loader, shards, hf_processor)
        stream.next(6)
        deadline = time.monotonic() + 30
        while loader.counters()["decoded"] < 12 and time.monotonic() < deadline:
            time.sleep(0.01)
        before = loader.counters()
        assert before["decoded"] == 12 and before["misses"] == 6
        stream.next(6)
        after = loader.counters()
        assert after["misses"] == 6 and after["hits"] == before["hits"] + 6
        assert after["wait_seconds"] == before["wait_seconds"]


def test_prefetch_stays_within_the_cache(tmp_path: Path, processor: MultimodalProcessor) -> None:
    shards = shards_of(tmp_path, [{"0.png": png(picture(64, 64, i))} for i in range(20)])
    places = [MediaPlace("s", ref.shard, ref.key, "0.png") for ref in shards.refs]
    item = processor.process_image(picture(64, 64), "x").nbytes
    config = dataclasses.replace(MEDIA, cache_bytes=6 * item, num_workers=2)
    with MediaLoader(processor, config) as loader:
        loader.register("s", shards)
        loader.prefetch(places)
        deadline = time.monotonic() + 30
        while loader.counters()["decoded"] < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        assert loader.counters()["decoded"] == 3  # half of the cache
        for place in places:
            loader.get(place)
        counters = loader.counters()
        assert counters["decoded"] == 20  # nothing was pushed out before it was used
        assert counters["held_bytes"] <= 6 * item


def test_an_announcement_replaces_the_owners_last_one(tmp_path: Path, processor: MultimodalProcessor) -> None:
    shards = shards_of(tmp_path, [{"0.png": png(picture(64, 64, i))} for i in range(8)])
    places = [MediaPlace("s", ref.shard, ref.key, "0.png") for ref in shards.refs]
    item = processor.process_image(picture(64, 64), "x").nbytes
    config = dataclasses.replace(MEDIA, cache_bytes=2 * item, num_workers=1)
    with MediaLoader(processor, config) as loader:
        loader.register("s", shards)
        for owner in range(4):  # never asked for: each must give way to the next
            loader.prefetch([places[owner]], owner="stream")
            deadline = time.monotonic() + 30
            while loader.counters()["decoded"] <= owner and time.monotonic() < deadline:
                time.sleep(0.01)
        counters = loader.counters()
        assert counters["decoded"] == 4 and counters["held_bytes"] <= 2 * item


def test_many_threads_share_one_decoding(tmp_path: Path, processor: MultimodalProcessor) -> None:
    shards = shards_of(tmp_path, many(6))
    places = [
        MediaPlace("s", ref.shard, ref.key, "mp4" if i % 3 == 2 else "0.png")
        for i, ref in enumerate(shards.refs)
    ]
    found: list[list[str]] = []
    with MediaLoader(processor, MEDIA) as loader:
        loader.register("s", shards)
        threads = [
            threading.Thread(target=lambda: found.append([loader.get(p)[1].pixel_hash for p in places]))
            for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert loader.counters()["decoded"] == 6
    assert len(found) == 6 and all(row == found[0] for row in found)


BROKEN: list[tuple[str, Mapping[str, bytes]]] = [
    ("corrupt_image", {"0.png": png(picture())[:300]}),
    ("truncated_video", {"mp4": clip()[:900]}),
    ("corrupt_video", {"mp4": without_decoder()}),
    ("too_many_pixels", {"0.png": png(picture(200, 200))}),
    ("bad_size", {"0.png": png(picture(2, 500))}),
]


def test_bad_media_are_skipped_counted_and_named(
    tmp_path: Path, hf_processor: Any, caplog: pytest.LogCaptureFixture
) -> None:
    good = [{"0.png": png(picture(64, 64, i))} for i in range(5)]
    shards = shards_of(tmp_path, [*good, *(members for _, members in BROKEN)])
    config = dataclasses.replace(MEDIA, max_pixels_hard_limit=100 * 100 * 3)
    with (
        MediaLoader(MultimodalProcessor(hf_processor, config), config) as loader,
        caplog.at_level(logging.WARNING),
    ):
        stream = stream_over(loader, shards, hf_processor)
        prompts = stream.next(10)
        assert {p.prompt_id[-1] for p in prompts} == set("01234")
        for number, (reason, _) in enumerate(BROKEN, start=5):
            assert stream.skipped[reason] >= 1
            assert f"sample '{number:09d}'" in caplog.text
        assert loader.counters()["failed"] == len(BROKEN)


def test_missing_and_mismatched_members_are_skipped(
    tmp_path: Path, hf_processor: Any, processor: MultimodalProcessor
) -> None:
    image = png(picture())
    shown = [{"type": "image", "image": "3.png"}, {"type": "text", "text": "?"}]
    samples = [
        NewSample(prompt="<image>", answer="a", verifier="exact", media={"0.png": image}),
        NewSample(prompt="<image><image>", answer="a", verifier="exact", media={"0.png": image}),
        NewSample(
            prompt=[{"role": "user", "content": shown}], answer="a", verifier="exact", media={"0.png": image}
        ),
    ]
    write_shards(samples, tmp_path, "toy")
    shards = ShardSet.open([str(tmp_path / "*.tar")])
    with MediaLoader(processor, MEDIA) as loader:
        stream = stream_over(loader, shards, hf_processor)
        assert len(stream.next(2)) == 2
        assert stream.skipped["media_mismatch"] >= 1 and stream.skipped["no_member"] >= 1


def test_named_members_are_shown_in_the_order_of_the_parts(
    tmp_path: Path, hf_processor: Any, processor: MultimodalProcessor
) -> None:
    shown = [{"type": "image", "image": name} for name in ("1.png", "0.png", "1.png")]
    media = {"0.png": png(picture(32, 32)), "1.png": png(picture(64, 64)), "2.png": png(picture())}
    prompt = [{"role": "user", "content": shown}]
    write_shards([NewSample(prompt=prompt, answer="a", verifier="exact", media=media)], tmp_path, "toy")
    shards = ShardSet.open([str(tmp_path / "*.tar")])
    with MediaLoader(processor, MEDIA) as loader:
        (read,) = stream_over(loader, shards, hf_processor).next(1)
        assert [ref.extension for ref in read.media] == ["1.png", "0.png", "1.png"]
        assert (read.token_ids == processor.image_token_id).sum() == 16 + 4 + 16


def test_text_and_media_samples_mix(
    tmp_path: Path, hf_processor: Any, processor: MultimodalProcessor
) -> None:
    shards = shards_of(tmp_path, [{}, {"0.png": png(picture())}])
    with MediaLoader(processor, MEDIA) as loader:
        prompts = load_validation(reader_over(loader, shards, hf_processor, "image/validation"))
    assert [len(prompt.media) for prompt in prompts] == [0, 1]
    assert hf_processor.tokenizer.decode(prompts[0].token_ids).count("<|image_pad|>") == 0


def test_changed_media_are_an_error_that_names_them(
    tmp_path: Path, hf_processor: Any, processor: MultimodalProcessor
) -> None:
    mine = shards_of(tmp_path / "mine", [{"0.png": png(picture(seed=1))}])
    theirs = shards_of(tmp_path / "theirs", [{"0.png": png(picture(seed=2))}])
    with MediaLoader(processor, MEDIA) as student, MediaLoader(processor, MEDIA) as teacher:
        (prompt,) = stream_over(student, mine, hf_processor).next(1)
        teacher.register("image/train", theirs)
        with pytest.raises(MediaMismatchError) as error:
            teacher.features(prompt.media)
        for part in (
            str(tmp_path / "theirs" / "toy-000000.tar"),
            "sample '000000000'",
            prompt.media[0].content_hash,
            content_hash(png(picture(seed=2))),
        ):
            assert part in str(error.value)
        with pytest.raises(DataError, match="no media source 'image/train'"):
            MediaLoader(processor, MEDIA).features(prompt.media)
        with pytest.raises(DataError, match="registered for other shards"):
            student.register("image/train", shards_of(tmp_path / "more", many(2)))


def test_media_can_be_shipped(tmp_path: Path, hf_processor: Any, processor: MultimodalProcessor) -> None:
    shards = shards_of(tmp_path, many(3))
    with MediaLoader(processor, MEDIA) as student, MediaLoader(processor, MEDIA) as teacher:
        for prompt in stream_over(student, shards, hf_processor).next(3):
            (ref,) = prompt.media
            data = student.encoded(ref)
            with pytest.raises(MediaMismatchError, match="shipped"):
                teacher.put_encoded(ref, data + b"x")
            teacher.put_encoded(ref, data)
            mine, theirs = student.features(prompt.media), teacher.features(prompt.media)
            assert mine is not None and theirs is not None
            assert mine.pixel_hash == theirs.pixel_hash
        teacher.drop_encoded()
        with pytest.raises(DataError, match="no media source"):
            teacher.encoded(ref)
        assert place_of(ref).ref(ref.content_hash) == ref


# ---- ranks share the decoding ---------------------------------------------------------------------------


class _Branch:
    """Threads in place of ranks: ``exchange`` brings together what each of them gives."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self.given: list[Any] = [None] * size

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.given[rank] = encode(value)
        self.barrier.wait(60)
        everything = [decode(data) for data in self.given]
        self.barrier.wait(60)
        return everything


def test_ranks_decode_their_share_and_draw_the_same_prompts(
    tmp_path: Path, hf_processor: Any, processor: MultimodalProcessor
) -> None:
    """Four ranks in two engines. A medium that cannot be used is skipped by all of them."""
    media = many(11)
    media[4] = {"0.png": b"no image"}
    shards = shards_of(tmp_path, media)
    quiet = dataclasses.replace(MEDIA, num_workers=0)
    with MediaLoader(processor, quiet) as loader:
        alone = stream_over(loader, shards, hf_processor)
        expected = [alone.next(4), alone.next(4), alone.next(4)]
        decoded_alone = loader.counters()["decoded"] + loader.counters()["failed"]
    assert decoded_alone == 11
    branch = _Branch(4)

    def rank(number: int) -> tuple[list[list[Prompt]], Mapping[str, int], float, float]:
        share = MediaShare(
            index=number // 2,
            count=2,
            sends=number % 2 == 0,
            exchange=lambda value: branch.exchange(number, value),
        )
        with MediaLoader(processor, quiet) as loader:
            reader = PromptReader(
                shards,
                hf_processor.tokenizer,
                domain="image",
                max_prompt_tokens=500,
                media=MediaPrompts(loader, "image/train", shards, share),
            )
            stream = PromptStream(reader, seed=3)
            drawn = [stream.next(4), stream.next(4), stream.next(4)]
            decoded = loader.counters()["decoded"] + loader.counters()["failed"]
            for prompts in drawn:  # what its engine samples (before the first one that is skipped)
                for prompt in share.mine(prompts):
                    loader.features(prompt.media)
            return drawn, stream.skipped, decoded, loader.counters()["decoded"]

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(rank, range(4)))
    for drawn, skipped, *_ in results:
        assert skipped == alone.skipped and sum(skipped.values()) >= 1
        for mine, theirs in zip(drawn, expected, strict=True):
            assert len(mine) == len(theirs) and all(map(same, mine, theirs))
    decoded = [counted for *_, counted, _ in results]
    assert decoded[1] == decoded[3] == 0, "the second rank of an engine is told"
    # two prompts of the second epoch may be the other engine's this time
    assert 11 <= decoded[0] + decoded[2] <= 13
    assert max(decoded[0], decoded[2]) <= 8, "alone, a rank decodes 11"
    assert all(after <= 8 for *_, after in results), "sampling needs little beyond a rank's own share"
