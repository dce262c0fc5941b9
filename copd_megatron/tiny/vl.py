"""The tiny Qwen3-VL base: makes the Hugging Face folder of a recipe, with a real ``Qwen3VLProcessor``, once,
and the shards of its three domains. The counterpart of ``base.py``."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from copd_megatron.tiny.base import Progress, make_once, reports
from copd_megatron.tiny.vl_recipe import VisualBase, visual_base_digest, visual_data_digest

if TYPE_CHECKING:  # torch and transformers take seconds to import, and a cached model needs neither
    from torch import Tensor, nn
    from transformers import Qwen3VLForConditionalGeneration, Qwen3VLProcessor

    from copd_megatron.tiny.vl_demonstrations import Example, Shown

VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
PHRASES = (" seconds>", "Calculate ", "Sum of the digits?")
"""Phrases with a token of their own, which keeps prompts short: those that the questions repeat, and the end
of the time stamp before every temporal patch of a video."""

_PART = "{%- for part in message['content'] if part['type'] == 'text' -%}\n{{ part['text'] }}\n{%- endfor -%}"
_PART_OR_MEDIUM = """\
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part['type'] == 'video' -%}<|vision_start|><|video_pad|><|vision_end|>
{%- else -%}{{ part['text'] }}
{%- endif -%}
{%- endfor -%}"""


def make_visual_data(out: Path, recipe: VisualBase) -> bool:
    """Writes the shards ``<out>/<domain>-{train,validation}-NNNNNN.tar``. Returns False if they exist
    already.

    Raises TinyBaseError if ``out`` holds something else, DataError if a family refuses its settings.
    """

    def make(folder: Path) -> dict[str, object]:
        _write_domains(folder, recipe, recipe.num_train)
        return {"recipe": asdict(recipe)}

    return make_once(out, visual_data_digest(recipe), make)


def make_visual_base(
    out: Path,
    recipe: VisualBase,
    *,
    seed: int = 1,
    progress: Progress | None = None,
    prepared: Callable[[int, int], None] | None = None,
) -> bool:
    """Makes the model folder ``out``. Returns False if the same recipe and seed have made it before.

    The same recipe, seed and machine give the same bytes. ``out`` appears only when it is complete.
    ``prepared``: called with the number of tasks that are drawn for the warm-up, and of all.

    Raises TinyBaseError if ``out`` holds something that was not made here.
    """

    def make(folder: Path) -> dict[str, object]:
        losses = _make(folder, recipe, seed, progress, prepared)
        return {"seed": seed, "recipe": asdict(recipe), "final_loss": sum(losses[-50:]) / len(losses[-50:])}

    return make_once(out, visual_base_digest(recipe, seed), make)


def _write_domains(folder: Path, recipe: VisualBase, num_train: int) -> None:
    from copd_megatron.tiny.tasks.text import write_domain
    from copd_megatron.tiny.tasks.visual import VisualShare, write_visual_domain

    num_validation, seed = recipe.num_validation, recipe.data_seed
    write_domain(
        folder,
        recipe.text.name,
        [recipe.text.family],
        num_train=num_train,
        num_validation=num_validation,
        seed=seed,
    )
    for domain in recipe.visual:
        share = VisualShare(name=domain.family, settings=domain.settings)
        write_visual_domain(
            folder, domain.name, [share], num_train=num_train, num_validation=num_validation, seed=seed
        )


def validation_tasks(recipe: VisualBase) -> tuple[set[str], set[Shown]]:
    """What the warm-up must not see: prompts of the text domain; prompts and media of the visual domains."""
    from copd_megatron.data import ShardSet
    from copd_megatron.tiny.vl_demonstrations import shown

    prompts: set[str] = set()
    visual: set[Shown] = set()
    with tempfile.TemporaryDirectory() as folder:
        # validation tasks are drawn first, so a single training task does not change them and is quick
        _write_domains(Path(folder), recipe, 1)
        shards = ShardSet.open([f"{folder}/*-validation-*.tar"])
        for ref in shards.refs:
            sample = shards.read(ref)
            assert isinstance(sample.prompt, str)  # write_domain and write_visual_domain write plain prompts
            if sample.media:
                visual.add(
                    shown(sample.prompt, {name: shards.read_member(ref, name) for name in sample.media})
                )
            else:
                prompts.add(sample.prompt)
    return prompts, visual


def _make(
    folder: Path,
    recipe: VisualBase,
    seed: int,
    progress: Progress | None,
    prepared: Callable[[int, int], None] | None,
) -> list[float]:
    from copd_megatron.config.schema import MediaConfig
    from copd_megatron.data.processing import MultimodalProcessor
    from copd_megatron.tiny.shares import Share, in_shares
    from copd_megatron.tiny.vl_demonstrations import batches_of_examples, encoded_pools
    from copd_megatron.tiny.warm_up import reproducible, warm_up

    settings = recipe.warm_up
    processor = build_processor(recipe)
    with reproducible(seed, recipe.num_threads):
        model = build_visual_model(recipe, processor)
        prompts, visual = validation_tasks(recipe)
        # use every frame of the generated videos, whatever their rate
        ours = MultimodalProcessor(processor, MediaConfig(frame_rate=1000.0))

        # here, since libraries that encode videos have threads, which a forked process lacks
        pools = encoded_pools(recipe, ours, seed=seed, held_out=visual, prepared=prepared)

        def train(share: Share) -> list[float]:
            batches = batches_of_examples(recipe, ours, seed=seed, held_out_prompts=prompts, pools=pools)
            return warm_up(
                model,
                (part_of(batch, share.rows) for batch in batches),
                settings,
                report=reports(progress, settings, share),
                loss=lambda model, batch: examples_loss(model, batch, ours),
                share=share,
            )

        losses = in_shares(recipe.num_processes, sum(p.numel() for p in model.parameters()), train)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return losses


def build_processor(recipe: VisualBase) -> Qwen3VLProcessor:
    """The text base's tokenizer with vision markers, and Qwen3-VL's image and video processors."""
    from tokenizers import AddedToken  # type: ignore[import-untyped]
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    from copd_megatron.tiny.tokenizer import CHAT_TEMPLATE, build_tokenizer

    assert _PART in CHAT_TEMPLATE
    template = CHAT_TEMPLATE.replace(_PART, _PART_OR_MEDIUM)
    tokenizer = build_tokenizer(
        recipe.model.vocab_size - len(PHRASES), (VISION_START, VISION_END, IMAGE, VIDEO)
    )
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in PHRASES])
    tokenizer.chat_template = template
    vision = recipe.vision
    common: dict[str, Any] = {
        "patch_size": vision.patch_size,
        "merge_size": vision.spatial_merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }

    def size(pixels: tuple[int, int]) -> dict[str, int]:
        return {"shortest_edge": pixels[0], "longest_edge": pixels[1]}

    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size(vision.image_pixels), **common),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(size=size(vision.video_pixels), fps=2, min_frames=2, **common),
        chat_template=template,
    )


def build_visual_model(recipe: VisualBase, processor: Qwen3VLProcessor) -> Qwen3VLForConditionalGeneration:
    """A float32 Qwen3-VL with random weights, from torch's global generator."""
    from transformers import GenerationConfig, Qwen3VLConfig, Qwen3VLForConditionalGeneration

    from copd_megatron.policy.megatron.vision_attention import use_packed_attention

    tokenizer = processor.tokenizer
    size = asdict(recipe.model)
    theta = size.pop("rope_theta")
    half = recipe.model.head_dim // 2
    sides = half // 4
    vision = {
        name: value
        for name, value in asdict(recipe.vision).items()
        if name not in ("image_pixels", "video_pixels", "deepstack_visual_indexes")
    }
    start, end, image, video = tokenizer.convert_tokens_to_ids([VISION_START, VISION_END, IMAGE, VIDEO])
    config = Qwen3VLConfig(
        text_config={
            **size,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": theta,
                "mrope_section": [half - 2 * sides, sides, sides],
                "mrope_interleaved": True,
            },
            "tie_word_embeddings": True,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "dtype": "float32",
        },
        vision_config={
            **vision,
            "out_hidden_size": recipe.model.hidden_size,
            "deepstack_visual_indexes": list(recipe.vision.deepstack_visual_indexes),
        },
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=True,
    )
    model = Qwen3VLForConditionalGeneration(config).float()
    use_packed_attention(model.model.visual)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    return model


def part_of(batch: Mapping[str, list[Example]], rows: slice) -> dict[str, Any]:
    """Some examples of each domain, and the ``normalizer`` of the whole batch."""
    num_tokens = sum(len(example.response_ids) for examples in batch.values() for example in examples)
    part = {name: examples[rows] for name, examples in batch.items()}
    return {"examples": part, "normalizer": num_tokens}


def examples_loss(model: nn.Module, batch: Mapping[str, Any], processor: Any) -> Tensor:
    """Cross-entropy of the response tokens of ``batch["examples"]``, by domain, over ``batch["normalizer"]``.

    Each domain has a forward pass of its own, so that short prompts are not padded to the length of videos.

    Args:
        processor: a ``MultimodalProcessor``.
    """
    import torch
    import torch.nn.functional as F

    from copd_megatron.tiny.warm_up import IGNORED

    total = torch.zeros(())
    for examples in batch["examples"].values():
        if not examples:
            continue
        inputs, labels = collate(examples, processor)
        logits = model(**inputs, use_cache=False).logits
        total = total + F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(),
            labels[:, 1:].flatten(),
            ignore_index=IGNORED,
            reduction="sum",
        )
    return total / batch["normalizer"]


def collate(examples: list[Example], processor: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Model inputs and labels [B, T] of examples that all have an image, all have a video, or all have
    neither."""
    import torch

    from copd_megatron.data.processing import MediaFeatures
    from copd_megatron.tiny.warm_up import pad_batch

    padded = pad_batch(
        [(example.prompt_ids, example.response_ids) for example in examples], processor.tokenizer.pad_token_id
    )
    ids = padded["input_ids"]
    inputs: dict[str, Tensor] = {"input_ids": ids}
    media = MediaFeatures(items=tuple(example.item for example in examples if example.item is not None))
    for name in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
        array = getattr(media, name)
        if array is not None:
            tensor = torch.tensor(array)
            inputs[name] = tensor.long() if name.endswith("thw") else tensor
    types = (ids == processor.image_token_id).int() + 2 * (ids == processor.video_token_id).int()
    inputs["mm_token_type_ids"] = types
    return inputs, padded["labels"]
