"""What the parts of ``tools/gpu_check.py`` work with: models of real shapes with random weights, sequences,
images, actors and engines.

Everything is random and seeded; nothing is fetched. On CPU everything is tiny and in float32.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from copd_megatron.config.schema import (
    FP8Recipe,
    MediaConfig,
    MemoryConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    RolloutConfig,
    TrainingConfig,
)
from copd_megatron.hf.companions import shard_name, write_index
from copd_megatron.hf.model_config import read_model_shape
from copd_megatron.hf.planned_file import write_safetensors
from copd_megatron.model.shape import ModelShape
from copd_megatron.records import IntArray, MediaRef, Prompt, TrainRow

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
PACK_TOKENS = 8192
_WEIGHTS_SEED = 0


# ---- models of real shapes -------------------------------------------------------------------------------

_QWEN = {"vocab_size": 151936, "rope_theta": 1e6, "head_dim": 128}
TEXT: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 320, "rope_theta": 1e5,
    },
    "text-0.6b": {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, **_QWEN,
    },
    "text-4b": {
        "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, **_QWEN,
    },
}  # fmt: skip
EXPERTS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny-moe": ("tiny", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
    # Qwen3-30B-A3B's layer, a few of them, with a quarter of its experts
    "moe-small": (
        "text-0.6b",
        {
            "hidden_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 32, "num_key_value_heads": 4,
            "num_experts": 32, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
        },
    ),
}  # fmt: skip
"""A text shape, and what differs."""
VISION: dict[str, tuple[str, dict[str, Any], dict[str, Any], list[int]]] = {
    "tiny-vl": (
        "tiny",
        {},
        {
            "depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 8,
            "out_hidden_size": 64, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1],
        },
        [8, 4, 4],
    ),
    "vl-small": (
        "text-0.6b",
        {"num_hidden_layers": 8},
        {
            "depth": 6, "hidden_size": 512, "intermediate_size": 2048, "num_heads": 8, "patch_size": 16,
            "out_hidden_size": 1024, "num_position_embeddings": 2304, "deepstack_visual_indexes": [1, 3, 4],
        },
        [24, 20, 20],
    ),
    "vl-4b": (
        "text-4b",
        {},
        {
            "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "patch_size": 16,
            "out_hidden_size": 2560, "num_position_embeddings": 2304, "deepstack_visual_indexes": [5, 11, 17],
        },
        [24, 20, 20],
    ),
}  # fmt: skip
"""A text shape, what differs, the vision tower, and the sections of the rotary embedding."""
SHAPES = (*TEXT, *EXPERTS, *VISION)


def make_folder(work: Path, shape: str, *, weights: bool = False, layers: int | None = None) -> Path:
    """A Hugging Face folder of that shape, made once; ``layers`` in place of the shape's own number.

    Without ``weights`` it is a shell, for engines, which start from dummy weights, and for actors inside
    ``random_weights``: 8 GB of a 4B model would cost each process its way through the disk.
    """
    name = shape + ("" if layers is None else f"-{layers}") + ("-weights" if weights else "")
    folder = work / name
    if (folder / "done").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(_hf_config(folder, shape, layers), indent=2))
    write_safetensors(folder / "model.safetensors", {"placeholder": torch.zeros(1)})
    if weights:
        _write_weights(folder)
    (folder / "done").touch()
    return folder


def _write_weights(folder: Path) -> None:
    from copd_megatron.model.slots import slots

    draw, dtype = _Draw(read_model_shape(folder)), compute_dtype()
    groups: list[list[Any]] = [[]]
    held = 0
    for slot in slots(read_model_shape(folder), 1):
        size = math.prod(slot.shape) * dtype.itemsize
        if held and held + size > 2 * GIB:
            groups.append([])
            held = 0
        groups[-1].append(slot)
        held += size
    where: dict[str, str] = {}
    total = 0
    (folder / "model.safetensors").unlink()
    for number, group in enumerate(groups, start=1):
        tensors = {slot.name: draw(slot.name, slot.shape).to(dtype).cpu() for slot in group}
        file = shard_name(number, len(groups))
        write_safetensors(folder / file, tensors)
        where |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    write_index(folder, where, total)


class _Draw:
    """Random tensors by Hugging Face name, on the device. Matrices keep the size of what passes through
    them; embeddings are large enough that logits have a standard deviation near 2 and an error shows."""

    def __init__(self, dims: ModelShape) -> None:
        self._hidden = dims.hidden_size
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._generator = torch.Generator(self._device).manual_seed(_WEIGHTS_SEED)

    def __call__(self, name: str, size: tuple[int, ...]) -> torch.Tensor:
        noise = torch.randn(size, generator=self._generator, device=self._device)
        if len(size) == 1:
            norm = name.endswith("norm.weight") or (".norm" in name and name.endswith("weight"))
            return noise.mul_(0.1).add_(1 if norm else 0)
        if name.endswith("embed_tokens.weight"):
            return noise.mul_(2 / math.sqrt(self._hidden))
        return noise.mul_(1 / math.sqrt(math.prod(size[1:])))


@contextlib.contextmanager
def random_weights() -> Iterator[None]:
    """Actors made inside have random weights, drawn on the device, in place of a folder's."""
    from copd_megatron.policy import actor

    def fill(view: Any, folder: str | Path) -> None:
        draw = _Draw(view.dims)
        for slot in view.local:
            view.write(slot, draw(slot.name, view.local_shape(slot)))

    with mock.patch.object(actor, "load_hf", fill):
        yield


def _hf_config(folder: Path, shape: str, layers: int | None) -> dict[str, Any]:
    """As a dictionary; writes the tokenizer, or with a vision tower the processor, that it names."""
    from transformers import Qwen3Config, Qwen3MoeConfig, Qwen3VLConfig

    from copd_megatron.tiny.tokenizer import build_tokenizer

    changed = {} if layers is None else {"num_hidden_layers": layers}
    if shape in TEXT or shape in EXPERTS:
        build_tokenizer(320).save_pretrained(folder)
        common: dict[str, Any] = {"tie_word_embeddings": True, "max_position_embeddings": 40960}
        if shape in TEXT:
            return dict(
                Qwen3Config(architectures=["Qwen3ForCausalLM"], **common, **(TEXT[shape] | changed)).to_dict()
            )
        base, experts = EXPERTS[shape]
        sizes = TEXT[base] | experts | changed
        return dict(
            Qwen3MoeConfig(
                architectures=["Qwen3MoeForCausalLM"], norm_topk_prob=True, **common, **sizes
            ).to_dict()
        )
    base, differs, tower, section = VISION[shape]
    processor = _save_processor(folder, tower["patch_size"])
    text = TEXT[base] | differs | changed
    rope = {
        "rope_type": "default",
        "rope_theta": text.pop("rope_theta"),
        "mrope_section": section,
        "mrope_interleaved": True,
    }
    start, end = processor.tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|vision_end|>"])
    visual = Qwen3VLConfig(
        architectures=["Qwen3VLForConditionalGeneration"],
        text_config={**text, "rope_parameters": rope, "tie_word_embeddings": True, "pad_token_id": 0},
        vision_config={"spatial_merge_size": 2, "temporal_patch_size": 2, **tower},
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=True,
    )
    return dict(visual.to_dict())


def _save_processor(folder: Path, patch: int) -> Any:
    """The tiny base's processor for patches of that size: images of at most 32 x 32 patches."""
    from copd_megatron.tiny.vl import build_processor
    from copd_megatron.tiny.vl_recipe import VL_BASE

    pixels = ((4 * patch) ** 2, (32 * patch) ** 2)
    vision = replace(
        VL_BASE.vision, patch_size=patch, image_pixels=pixels, video_pixels=(2 * pixels[0], 2 * pixels[1])
    )
    recipe = replace(VL_BASE, model=replace(VL_BASE.model, vocab_size=320), vision=vision)
    processor = build_processor(recipe)
    processor.save_pretrained(folder)
    return processor


# ---- sequences and images --------------------------------------------------------------------------------


class Media:
    """Random images by reference, as ``data.loader.MediaLoader`` is to a run: for an actor's ``features``
    and an engine's ``media``."""

    def __init__(self, folder: Path) -> None:
        from copd_megatron.data.processing import MultimodalProcessor

        self.processor = MultimodalProcessor.from_folder(folder, MediaConfig())
        self._items: dict[MediaRef, Any] = {}

    def image(self, rng: np.random.Generator, sides: tuple[int, int]) -> tuple[MediaRef, IntArray]:
        """A new image of ``sides`` pixels (height, width): its reference and the tokens of its place."""
        key = str(len(self._items))
        pixels = rng.integers(0, 256, (*sides, 3), dtype=np.uint8)
        item = self.processor.process_image(pixels, key)
        ref = MediaRef(
            source="check", shard="check", key=key, extension="png", kind="image", content_hash=key
        )
        self._items[ref] = item
        return ref, item.replacement_ids

    def features(self, refs: Sequence[MediaRef]) -> Any:
        """What the processor made of them; None for no references."""
        from copd_megatron.data.processing import MediaFeatures

        return MediaFeatures(items=tuple(self._items[ref] for ref in refs)) if refs else None


def media_of(folder: Path) -> Media | None:
    """For a vision-language model; None for a text model."""
    return Media(folder) if read_model_shape(folder).vision is not None else None


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A random prompt and response, with an image in the prompt or none."""

    token_ids: IntArray
    prompt_length: int
    media: tuple[MediaRef, ...] = ()


def make_sequences(
    dims: ModelShape,
    lengths: Sequence[int],
    *,
    seed: int,
    media: Media | None = None,
    patches: tuple[int, int] = (4, 6),
) -> list[Sample]:
    """Sequences of these lengths in tokens, a quarter of each prompt; with ``media``, every second one that
    has room begins with an image of ``patches`` (rows, columns)."""
    rng = np.random.default_rng(seed)
    made = []
    for number, length in enumerate(lengths):
        prompt = max(1, length // 4)
        refs: tuple[MediaRef, ...] = ()
        head = np.zeros(0, np.int32)
        if media is not None and number % 2:
            room = math.prod(patches) // 4 + 4
            if length > room + 1:
                head, refs = _image_prompt(dims, media, rng, patches)
                prompt = max(prompt, room)
        tail = rng.integers(0, 250, size=length - len(head)).astype(np.int32)
        made.append(Sample(token_ids=np.concatenate([head, tail]), prompt_length=prompt, media=refs))
    return made


def _image_prompt(
    dims: ModelShape, media: Media, rng: np.random.Generator, patches: tuple[int, int]
) -> tuple[IntArray, tuple[MediaRef, ...]]:
    """Tokens of a prompt that is an image between its markers, and the image."""
    assert dims.vision is not None
    side = dims.vision.patch_size
    ref, place = media.image(rng, (patches[0] * side, patches[1] * side))
    markers = media.processor.tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|vision_end|>"])
    return np.concatenate([[7], markers[:1], place, markers[1:]]).astype(np.int32), (ref,)


def make_prompts(
    count: int,
    length: int,
    *,
    dims: ModelShape | None = None,
    media: Media | None = None,
    patches: tuple[int, int] = (4, 6),
    seed: int = 7,
) -> list[Prompt]:
    """Prompts of ``length`` tokens; with ``media``, each with an image before them."""
    rng = np.random.default_rng(seed)
    prompts = []
    for number in range(count):
        tokens = rng.integers(0, 250, size=length).astype(np.int32)
        refs: tuple[MediaRef, ...] = ()
        if media is not None and dims is not None:
            head, refs = _image_prompt(dims, media, rng, patches)
            tokens = np.concatenate([head, tokens]).astype(np.int32)
        prompts.append(
            Prompt(
                prompt_id=f"{seed}/{number}",
                domain="check",
                token_ids=tokens,
                answer="",
                verifier="exact",
                media=refs,
            )
        )
    return prompts


def train_rows(sequences: Sequence[Any]) -> list[TrainRow]:
    """Their policy-gradient rows, with random advantages; ``sequences`` are samples or rollouts."""
    rng = np.random.default_rng(0)
    rows = []
    for sequence in sequences:
        length = len(sequence.token_ids) - sequence.prompt_length
        rows.append(
            TrainRow(
                token_ids=sequence.token_ids,
                prompt_length=sequence.prompt_length,
                advantages=rng.normal(size=length).astype(np.float32),
                loss_mask=np.ones(length, np.float32),
                component="native",
                media=sequence.media,
            )
        )
    return rows


# ---- actors and engines ----------------------------------------------------------------------------------


@contextlib.contextmanager
def one_rank() -> Iterator[None]:
    """A world of one process, and Megatron's state taken down at its end."""
    from megatron.core import parallel_state

    from copd_megatron.topology.single import single_process

    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29507")
    with single_process():
        try:
            yield
        finally:
            if parallel_state.model_parallel_is_initialized():
                parallel_state.destroy_model_parallel()


def compute_dtype() -> torch.dtype:
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def make_actor(
    folder: Path,
    *,
    media: Media | None = None,
    recipe: FP8Recipe = FP8Recipe.none,
    packed: bool = True,
    share_prompts: bool = False,
    trains: bool = False,
    memory: MemoryConfig | None = None,
    budget: int = PACK_TOKENS,
) -> Any:
    """A one-rank actor; a process may have one after the other. ``budget``: tokens of a micro-batch."""
    from megatron.core import parallel_state

    from copd_megatron.policy.actor import MegatronActor

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    return MegatronActor(
        model_path=folder,
        parallel=ParallelConfig(),
        training=TrainingConfig(
            micro_batch_tokens=budget,
            sequence_packing=packed,
            share_prompts=share_prompts,
            max_weight_lag=10**6,
        ),
        optimizer=OptimizerConfig(lr=1e-6) if trains else None,
        dtype=compute_dtype(),
        max_tokens=PACK_TOKENS,
        temperature=1.0,
        seed=1,
        total_steps=1000,
        precision=PrecisionConfig(fp8=recipe),
        memory=memory,
        features=lambda row: None if media is None else media.features(row.media),
    )


def make_engine(
    folder: Path,
    *,
    media: Media | None = None,
    max_tokens: int = 2048,
    can_sleep: bool = False,
    **settings: Any,
) -> Any:
    """The in-process vLLM engine of a one-rank branch; ``settings`` are ``RolloutConfig``'s."""
    from copd_megatron.rollout.engine import RolloutEngine

    loader: Any = media
    return RolloutEngine(
        model_path=folder,
        config=RolloutConfig(**settings),
        branch="check",
        run_id="gpu_check",
        dtype=compute_dtype(),
        max_tokens=max_tokens,
        seed=1,
        media=loader,
        can_sleep=can_sleep,
    )
