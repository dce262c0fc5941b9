"""Images and videos from shards to features: decoding, hashes, the processor, prefetch and cache."""

from __future__ import annotations

import dataclasses
import io
import logging
import threading
import time
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

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
from copd_megatron.data import BadSampleError, DataError, PromptStream, ShardSet, load_validation
from copd_megatron.data.convert.write import NewSample, write_shards
from copd_megatron.data.decode import decode_image, decode_video, sample_indices
from copd_megatron.data.loader import MediaLoader
from copd_megatron.data.media import MediaMismatchError, MediaPlace, content_hash, media_members, place_of
from copd_megatron.data.media_prompts import MediaPrompts
from copd_megatron.data.processing import MediaFeatures, MultimodalProcessor
from copd_megatron.records import Prompt
from copd_megatron.tiny.tasks.encode import mp4, png
from tests.support.hostile_media import clip, encoded, picture, without_decoder
from tests.support.models_vl import make_processor

RNG = np.random.default_rng(0)
CONFIG = MediaConfig(frame_rate=4.0, min_frames=2, num_workers=2)
LIMIT = 10**7


@pytest.fixture(scope="module")
def hf() -> Any:
    return make_processor()


@pytest.fixture(scope="module")
def processor(hf: Any) -> MultimodalProcessor:
    return MultimodalProcessor(hf, CONFIG)


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


# ---------------------------------------------------------------- decoding


def test_png_is_exact_and_jpeg_close() -> None:
    image = picture(40, 56)
    assert np.array_equal(decode_image(png(image), "x", max_pixels=LIMIT), image)
    smooth = np.broadcast_to(np.arange(0, 224, 4, dtype=np.uint8)[None, :, None], (40, 56, 3))
    decoded = decode_image(encoded(Image.fromarray(smooth), "JPEG", quality=95), "x", max_pixels=LIMIT)
    assert decoded.shape == (40, 56, 3) and np.abs(decoded.astype(int) - smooth).max() < 8


def test_transparency_turns_white_and_orientation_is_applied() -> None:
    clear = Image.new("RGBA", (8, 4), (255, 0, 0, 0))
    assert (decode_image(encoded(clear, "PNG"), "x", max_pixels=LIMIT) == 255).all()
    gray = Image.fromarray(np.full((4, 8), 77, dtype=np.uint8))
    assert (decode_image(encoded(gray, "PNG"), "x", max_pixels=LIMIT) == 77).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    turned = encoded(Image.fromarray(picture(4, 8)), "JPEG", exif=exif)
    assert decode_image(turned, "x", max_pixels=LIMIT).shape == (8, 4, 3)


def reason_of(error: pytest.ExceptionInfo[BadSampleError]) -> str:
    assert "shard s, sample 'k'" in str(error.value)
    return error.value.reason


def test_big_images_are_refused_before_decoding() -> None:
    with pytest.raises(BadSampleError, match=r"64 x 64 = 4096 pixels exceed.*= 4095") as error:
        decode_image(png(picture()), "shard s, sample 'k'", max_pixels=4095)
    assert reason_of(error) == "too_many_pixels"


def test_videos_are_exact_and_sampled_evenly() -> None:
    frames = [picture(32, 48, i) for i in range(20)]
    data = mp4(frames, 10.0)
    video = decode_video(data, "x", MediaConfig(frame_rate=2.0, min_frames=2))
    assert video.frames_indices == (0, 6, 13, 19)  # 2 seconds, 2 frames each
    assert video.total_num_frames == 20 and video.fps == 10.0 and video.duration == 2.0
    assert np.array_equal(video.frames, np.stack([frames[i] for i in video.frames_indices]))
    assert video.metadata()["frames_indices"] == [0, 6, 13, 19]


def test_frame_counts_are_bounded() -> None:
    def count(total: int, fps: float, **settings: Any) -> int:
        indices = sample_indices(total, fps, MediaConfig(**settings))
        assert list(indices) == sorted(set(indices)) and indices[0] >= 0 and indices[-1] < total
        return len(indices)

    assert count(300, 30.0, frame_rate=2.0) == 20
    assert count(300, 30.0, frame_rate=2.0, max_frames=8) == 8
    assert count(30, 30.0, frame_rate=2.0, min_frames=4) == 4
    assert count(3, 30.0, frame_rate=2.0, min_frames=4) == 3
    assert count(1, 30.0) == 1


def test_an_ordinary_lossy_video_decodes(hf: Any) -> None:
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(8))
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        for i in range(12):
            frame = av.VideoFrame.from_ndarray(np.full((64, 96, 3), 20 * i, dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    video = decode_video(buffer.getvalue(), "x", MediaConfig(frame_rate=8.0))
    levels = video.frames.reshape(12, -1).mean(1)
    assert np.abs(levels - 20 * np.arange(12)).max() < 6
    assert MultimodalProcessor(hf, CONFIG).process_video(video, "x").grid_thw.tolist() == [6, 8, 12]


def test_other_bad_videos_are_named() -> None:
    for data in (b"", b"not a video", bytes(4000)):
        with pytest.raises(BadSampleError) as error:
            decode_video(data, "shard s, sample 'k'", CONFIG)
        assert reason_of(error) == "corrupt_video"
    small = dataclasses.replace(CONFIG, max_pixels_hard_limit=8 * 64 * 64 - 1)
    with pytest.raises(BadSampleError, match="8 frames of 64 x 64") as error:
        decode_video(clip(), "shard s, sample 'k'", small)
    assert reason_of(error) == "too_many_pixels"


def test_members_are_in_natural_order() -> None:
    names = ["10.png", "mp4", "2.jpg", "json", "txt", "1.mp4", "0.png"]
    assert media_members(names) == ("0.png", "1.mp4", "2.jpg", "10.png", "mp4")


# ---------------------------------------------------------------- processing


def content(*kinds: str) -> list[dict[str, Any]]:
    return [
        {"type": "text", "text": kind} if kind not in ("image", "video") else {"type": kind} for kind in kinds
    ]


@pytest.mark.parametrize(
    "parts",
    [
        ("image", "How many?"),
        ("image", "image", "Same?"),
        ("video", "Which way?"),
        ("a", "video", "b", "image", "c", "video"),
    ],
    ids=["image", "images", "video", "mixed"],
)
def test_one_item_at_a_time_equals_the_processors_own_call(
    hf: Any, processor: MultimodalProcessor, parts: tuple[str, ...]
) -> None:
    images = [picture(64, 64, 1), picture(50, 90, 2)][: parts.count("image")]
    videos = [decode_video(clip(n, 64, n), "x", CONFIG) for n in (7, 4)][: parts.count("video")]
    messages = [{"role": "user", "content": content(*parts)}]
    text = hf.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    expected = hf(
        text=[text],
        images=[Image.fromarray(image) for image in images] or None,
        videos=[video.frames for video in videos] or None,
        video_metadata=[video.metadata() for video in videos] or None,
        do_sample_frames=False,
        return_tensors="np",
    )
    made = {
        "image": iter([processor.process_image(image, "x") for image in images]),
        "video": iter([processor.process_video(video, "x") for video in videos]),
    }
    items = [next(made[part]) for part in parts if part in made]
    features = MediaFeatures(items=tuple(items))
    split = processor.parts(messages, ["image"] * len(images) + ["video"] * len(videos), "x")
    ids = processor.encode(split, items, "x")
    assert ids.tolist() == expected["input_ids"][0].tolist()
    for name in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
        ours = getattr(features, name)
        assert (ours is None) == (name not in expected)
        assert ours is None or np.array_equal(ours, expected[name])
    places = processor.placeholders(ids, features)
    assert [place.item for place in places] == items
    for place in places:
        span = ids[place.offset : place.offset + place.length]
        pads = np.isin(span, [processor.image_token_id, processor.video_token_id]).sum()
        assert pads == place.item.grid_thw.prod() // 4


def test_placeholders_of_other_features_are_refused(processor: MultimodalProcessor) -> None:
    small, large = (processor.process_image(picture(size, size), "x") for size in (32, 64))
    messages = processor.parts("<image>?", ["image"], "x")
    ids = processor.encode(messages, [large], "x")
    with pytest.raises(ValueError, match="features are missing"):
        processor.placeholders(ids, MediaFeatures(items=(small,)))
    with pytest.raises(ValueError, match="does not match"):
        processor.placeholders(ids, MediaFeatures(items=(large, large)))
    with pytest.raises(ValueError, match="features are missing"):
        processor.placeholders(np.concatenate([ids, ids]), MediaFeatures(items=(large,)))


def test_placeholders_in_texts_become_parts(processor: MultimodalProcessor) -> None:
    def kinds(prompt: Any, *media: str) -> list[list[str]]:
        return [[part["type"] for part in m["content"]] for m in processor.parts(prompt, media, "x")]

    assert kinds("a<image>b<video>", "image", "video") == [["text", "image", "text", "video"]]
    assert kinds("question", "image", "video") == [["image", "video", "text"]]
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "<image>q"}]
    assert kinds(chat, "image") == [["text"], ["image", "text"]]
    assert kinds([chat[0], {"role": "user", "content": "q"}], "image") == [["text"], ["image", "text"]]
    for prompt, media in (("<image>", ["image", "image"]), ("<image><video>", ["image"])):
        with pytest.raises(BadSampleError, match="placeholder") as error:
            processor.parts(prompt, media, "x")
        assert error.value.reason == "media_mismatch"
    with pytest.raises(BadSampleError, match="Remove tokens"):
        processor.encode(processor.parts("<|image_pad|> <image>", ["image"], "x"), [], "x")


def test_system_prompt_and_plain_tokenizers(hf: Any, processor: MultimodalProcessor) -> None:
    item = processor.process_image(picture(32, 32), "x")
    messages = processor.parts("<image>hi", ["image"], "x")
    text = hf.tokenizer.decode(processor.encode(messages, [item], "x", "be kind"))
    pads = "<|image_pad|>" * 4
    assert text == (
        "<|im_start|>system\nbe kind<|im_end|>\n"
        f"<|im_start|>user\n<|vision_start|>{pads}<|vision_end|>hi<|im_end|>\n<|im_start|>assistant\n"
    )
    plain = make_processor()
    plain.chat_template = plain.tokenizer.chat_template = None
    ids = MultimodalProcessor(plain, CONFIG).encode(messages, [item], "x", "be kind")
    assert plain.tokenizer.decode(ids) == f"be kind\n\n<|vision_start|>{pads}<|vision_end|>hi"


def test_pixel_budgets_bound_the_patches(hf: Any) -> None:
    tight = MultimodalProcessor(
        hf, dataclasses.replace(CONFIG, image_max_pixels=32 * 32, video_max_pixels=8 * 32 * 32)
    )
    assert tight.budgets_changed and not MultimodalProcessor(hf, CONFIG).budgets_changed
    assert tight.process_image(picture(64, 64), "x").grid_thw.tolist() == [1, 4, 4]
    assert tight.process_video(decode_video(clip(), "x", CONFIG), "x").grid_thw.tolist() == [4, 4, 4]
    loose = MultimodalProcessor(hf, dataclasses.replace(CONFIG, image_min_pixels=96 * 96))
    assert loose.process_image(picture(64, 64), "x").grid_thw.tolist() == [1, 12, 12]
    with pytest.raises(DataError, match="exceeds the most"):
        MultimodalProcessor(hf, dataclasses.replace(CONFIG, image_max_pixels=32))
    with pytest.raises(BadSampleError, match="aspect ratio") as error:
        tight.process_image(np.zeros((2, 800, 3), dtype=np.uint8), "x")
    assert error.value.reason == "bad_size"


def test_pixel_hash_tells_items_apart(processor: MultimodalProcessor) -> None:
    first, again, other = (processor.process_image(picture(seed=seed), "x") for seed in (1, 1, 2))
    assert first.pixel_hash == again.pixel_hash != other.pixel_hash
    both = MediaFeatures(items=(first, other)).pixel_hash
    assert both != MediaFeatures(items=(other, first)).pixel_hash
    with pytest.raises(ValueError, match="read-only"):
        first.pixel_values[0, 0] = 1.0


def test_a_text_models_folder_is_refused(tmp_path: Path, hf: Any) -> None:
    with pytest.raises(DataError, match="no usable processor"):
        MultimodalProcessor.from_folder(tmp_path, CONFIG)
    with pytest.raises(DataError, match="lacks image_processor"):
        MultimodalProcessor(hf.tokenizer, CONFIG)


# ---------------------------------------------------------------- shards, prompts, loader


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


def stream_over(loader: MediaLoader, shards: ShardSet, hf: Any, **settings: Any) -> PromptStream:
    return PromptStream.from_config(
        DataConfig(max_prompt_tokens=500, **settings),
        hf.tokenizer,
        domain="image",
        seed=3,
        shards=shards,
        media=MediaPrompts(loader, "image/train", shards),
    )


def same(first: Prompt, second: Prompt) -> bool:
    return (
        first.prompt_id == second.prompt_id
        and np.array_equal(first.token_ids, second.token_ids)
        and first.media == second.media
    )


def test_prompts_carry_references_not_pixels(tmp_path: Path, hf: Any, processor: MultimodalProcessor) -> None:
    members = {"0.png": png(picture(32, 32, 1)), "1.png": png(picture(64, 64, 2)), "mp4": clip(4, 32)}
    shards = shards_of(tmp_path, [members])
    with MediaLoader(processor, CONFIG) as loader:
        (prompt,) = stream_over(loader, shards, hf).next(1)
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
    tmp_path: Path, hf: Any, processor: MultimodalProcessor
) -> None:
    shards = shards_of(tmp_path, many(24))
    seen = []
    for num_workers, cache_bytes in ((0, 0), (1, 2**30), (4, 2**30), (3, 300_000)):
        config = dataclasses.replace(CONFIG, num_workers=num_workers, cache_bytes=cache_bytes)
        with MediaLoader(processor, config) as loader:
            stream = stream_over(loader, shards, hf)
            prompts = stream.next(10) + stream.next(7) + stream.next(13)
            hashes = [features.pixel_hash for p in prompts if (features := loader.features(p.media))]
            seen.append((prompts, hashes))
            counters = loader.counters()
            assert counters["held_bytes"] <= max(cache_bytes, 100_000)
            assert (counters["evictions"] > 0) == (cache_bytes < 2**30)
    for prompts, hashes in seen[1:]:
        assert all(same(a, b) for a, b in zip(prompts, seen[0][0], strict=True))
        assert hashes == seen[0][1] and len(hashes) == 30


def test_the_next_batch_is_decoded_ahead(tmp_path: Path, hf: Any, processor: MultimodalProcessor) -> None:
    shards = shards_of(tmp_path, many(12))
    with MediaLoader(processor, CONFIG) as loader:
        stream = stream_over(loader, shards, hf)
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
    config = dataclasses.replace(CONFIG, cache_bytes=6 * item, num_workers=2)
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
    config = dataclasses.replace(CONFIG, cache_bytes=2 * item, num_workers=1)
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
    with MediaLoader(processor, CONFIG) as loader:
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
    tmp_path: Path, hf: Any, caplog: pytest.LogCaptureFixture
) -> None:
    good = [{"0.png": png(picture(64, 64, i))} for i in range(5)]
    shards = shards_of(tmp_path, [*good, *(members for _, members in BROKEN)])
    config = dataclasses.replace(CONFIG, max_pixels_hard_limit=100 * 100 * 3)
    with (
        MediaLoader(MultimodalProcessor(hf, config), config) as loader,
        caplog.at_level(logging.WARNING),
    ):
        stream = stream_over(loader, shards, hf)
        prompts = stream.next(10)
        assert {p.prompt_id[-1] for p in prompts} == set("01234")
        for number, (reason, _) in enumerate(BROKEN, start=5):
            assert stream.skipped[reason] >= 1
            assert f"sample '{number:09d}'" in caplog.text
        assert loader.counters()["failed"] == len(BROKEN)


def test_missing_and_mismatched_members_are_skipped(
    tmp_path: Path, hf: Any, processor: MultimodalProcessor
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
    with MediaLoader(processor, CONFIG) as loader:
        stream = stream_over(loader, shards, hf)
        assert len(stream.next(2)) == 2
        assert stream.skipped["media_mismatch"] >= 1 and stream.skipped["no_member"] >= 1


def test_named_members_are_shown_in_the_order_of_the_parts(
    tmp_path: Path, hf: Any, processor: MultimodalProcessor
) -> None:
    shown = [{"type": "image", "image": name} for name in ("1.png", "0.png", "1.png")]
    media = {"0.png": png(picture(32, 32)), "1.png": png(picture(64, 64)), "2.png": png(picture())}
    prompt = [{"role": "user", "content": shown}]
    write_shards([NewSample(prompt=prompt, answer="a", verifier="exact", media=media)], tmp_path, "toy")
    shards = ShardSet.open([str(tmp_path / "*.tar")])
    with MediaLoader(processor, CONFIG) as loader:
        (read,) = stream_over(loader, shards, hf).next(1)
        assert [ref.extension for ref in read.media] == ["1.png", "0.png", "1.png"]
        assert (read.token_ids == processor.image_token_id).sum() == 16 + 4 + 16


def test_text_and_media_samples_mix(tmp_path: Path, hf: Any, processor: MultimodalProcessor) -> None:
    shards = shards_of(tmp_path, [{}, {"0.png": png(picture())}])
    with MediaLoader(processor, CONFIG) as loader:
        prompts = load_validation(
            DataConfig(max_prompt_tokens=500),
            hf.tokenizer,
            domain="image",
            shards=shards,
            media=MediaPrompts(loader, "image/validation", shards),
        )
    assert [len(prompt.media) for prompt in prompts] == [0, 1]
    assert hf.tokenizer.decode(prompts[0].token_ids).count("<|image_pad|>") == 0


def test_changed_media_are_an_error_that_names_them(
    tmp_path: Path, hf: Any, processor: MultimodalProcessor
) -> None:
    mine = shards_of(tmp_path / "mine", [{"0.png": png(picture(seed=1))}])
    theirs = shards_of(tmp_path / "theirs", [{"0.png": png(picture(seed=2))}])
    with MediaLoader(processor, CONFIG) as student, MediaLoader(processor, CONFIG) as teacher:
        (prompt,) = stream_over(student, mine, hf).next(1)
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
            MediaLoader(processor, CONFIG).features(prompt.media)
        with pytest.raises(DataError, match="registered for other shards"):
            student.register("image/train", shards_of(tmp_path / "more", many(2)))


def test_media_can_be_shipped(tmp_path: Path, hf: Any, processor: MultimodalProcessor) -> None:
    shards = shards_of(tmp_path, many(3))
    with MediaLoader(processor, CONFIG) as student, MediaLoader(processor, CONFIG) as teacher:
        for prompt in stream_over(student, shards, hf).next(3):
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
