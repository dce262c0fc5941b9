"""Images and videos to features: what the model's own processor makes of them, item by item."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from copd_megatron.data import BadSampleError, DataError
from copd_megatron.data.decode import decode_video
from copd_megatron.data.processing import MediaFeatures, MultimodalProcessor
from tests.support.hostile_media import clip, picture
from tests.support.models_vl import MEDIA, make_processor


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
    hf_processor: Any, processor: MultimodalProcessor, parts: tuple[str, ...]
) -> None:
    images = [picture(64, 64, 1), picture(50, 90, 2)][: parts.count("image")]
    videos = [decode_video(clip(n, 64, n), "x", MEDIA) for n in (7, 4)][: parts.count("video")]
    messages = [{"role": "user", "content": content(*parts)}]
    text = hf_processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    expected = hf_processor(
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


def test_system_prompt_and_plain_tokenizers(hf_processor: Any, processor: MultimodalProcessor) -> None:
    item = processor.process_image(picture(32, 32), "x")
    messages = processor.parts("<image>hi", ["image"], "x")
    text = hf_processor.tokenizer.decode(processor.encode(messages, [item], "x", "be kind"))
    pads = "<|image_pad|>" * 4
    assert text == (
        "<|im_start|>system\nbe kind<|im_end|>\n"
        f"<|im_start|>user\n<|vision_start|>{pads}<|vision_end|>hi<|im_end|>\n<|im_start|>assistant\n"
    )
    plain = make_processor()
    plain.chat_template = plain.tokenizer.chat_template = None
    ids = MultimodalProcessor(plain, MEDIA).encode(messages, [item], "x", "be kind")
    assert plain.tokenizer.decode(ids) == f"be kind\n\n<|vision_start|>{pads}<|vision_end|>hi"


def test_pixel_budgets_bound_the_patches(hf_processor: Any) -> None:
    tight = MultimodalProcessor(
        hf_processor, dataclasses.replace(MEDIA, image_max_pixels=32 * 32, video_max_pixels=8 * 32 * 32)
    )
    assert tight.budgets_changed and not MultimodalProcessor(hf_processor, MEDIA).budgets_changed
    assert tight.process_image(picture(64, 64), "x").grid_thw.tolist() == [1, 4, 4]
    assert tight.process_video(decode_video(clip(), "x", MEDIA), "x").grid_thw.tolist() == [4, 4, 4]
    loose = MultimodalProcessor(hf_processor, dataclasses.replace(MEDIA, image_min_pixels=96 * 96))
    assert loose.process_image(picture(64, 64), "x").grid_thw.tolist() == [1, 12, 12]
    with pytest.raises(DataError, match="exceeds the most"):
        MultimodalProcessor(hf_processor, dataclasses.replace(MEDIA, image_max_pixels=32))
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


def test_a_text_models_folder_is_refused(tmp_path: Path, hf_processor: Any) -> None:
    with pytest.raises(DataError, match="no usable processor"):
        MultimodalProcessor.from_folder(tmp_path, MEDIA)
    with pytest.raises(DataError, match="lacks image_processor"):
        MultimodalProcessor(hf_processor.tokenizer, MEDIA)
