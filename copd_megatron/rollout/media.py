"""Prompts with processed media as vLLM engine inputs: the engine sees the trainer's own patches and tokens.

vLLM's front end makes an engine input from ``multi_modal_data`` by running its own copy of the processor. Its
engine also accepts finished inputs (``LLMEngine.add_request`` with a renderer's output), and this module
makes those: expanded token ids, the patches and grids of ``data.processing``, and the position of each item's
tokens. Nothing is processed twice. A test compares them with what the front end makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from copd_megatron.data.media import IMAGE, VIDEO
from copd_megatron.data.processing import ItemFeatures, MediaFeatures, MultimodalProcessor
from copd_megatron.records import IntArray


def engine_input(
    token_ids: IntArray, features: MediaFeatures | None, processor: MultimodalProcessor, *, version: int
) -> Any:
    """One prompt for ``LLMEngine.add_request``.

    Args:
        token_ids: [P] expanded prompt tokens.
        features: of its media, in placeholder order; None for a text prompt.
        processor: the one that made the features.
        version: weight version of the engine. It is part of the items' identities, so that the engine does
            not reuse vision features that it cached under older weights.

    Raises:
        ValueError: the tokens do not match the features.
    """
    from vllm.inputs.engine import mm_input, tokens_input
    from vllm.multimodal.inputs import MultiModalKwargsItems, PlaceholderRange

    ids = token_ids.tolist()
    if features is None:
        return tokens_input(ids)
    placeholders = processor.placeholders(token_ids, features)
    pads = {IMAGE: processor.image_token_id, VIDEO: processor.video_token_id}
    hashes: dict[str, list[str]] = {}
    ranges: dict[str, list[Any]] = {}
    for place in placeholders:
        kind, item = place.item.kind, place.item
        # a video's tokens also include time stamps and markers; only patch tokens take features
        mask = torch.from_numpy(item.replacement_ids == pads[kind]) if kind == VIDEO else None
        hashes.setdefault(kind, []).append(f"{item.pixel_hash}-{version}")
        ranges.setdefault(kind, []).append(
            PlaceholderRange(offset=place.offset, length=place.length, is_embed=mask)
        )
    tensors, fields = _model_inputs(features.items)
    return mm_input(
        prompt_token_ids=ids,
        mm_kwargs=MultiModalKwargsItems.from_hf_inputs(tensors, fields),
        mm_hashes=hashes,
        mm_placeholders=ranges,
    )


def _model_inputs(items: Sequence[ItemFeatures]) -> tuple[Any, dict[str, Any]]:
    """The tensors of all items under the model's argument names, and how to split them by item."""
    from transformers import BatchFeature
    from vllm.multimodal.inputs import MultiModalFieldConfig

    tensors: dict[str, Any] = {}
    fields: dict[str, Any] = {}
    for kind, pixels, grids in (
        (IMAGE, "pixel_values", "image_grid_thw"),
        (VIDEO, "pixel_values_videos", "video_grid_thw"),
    ):
        chosen = [item for item in items if item.kind == kind]
        if not chosen:
            continue
        grid = torch.from_numpy(np.stack([item.grid_thw for item in chosen]).astype(np.int64))
        parts = [item.pixel_values for item in chosen]
        # copied, because torch warns when it shares read-only memory such as the cache's arrays
        tensors[pixels] = torch.from_numpy(np.concatenate(parts) if len(parts) > 1 else parts[0].copy())
        tensors[grids] = grid
        fields[pixels] = MultiModalFieldConfig.flat_from_sizes(kind, grid.prod(-1))
        fields[grids] = MultiModalFieldConfig.batched(kind, keep_on_cpu=True)
        if kind == VIDEO:
            tensors["timestamps"] = [list(item.timestamps) for item in chosen]
            fields["timestamps"] = MultiModalFieldConfig.batched(kind, keep_on_cpu=True)
    return BatchFeature(tensors), fields


def engine_settings(processor: MultimodalProcessor) -> dict[str, Any]:
    """Arguments of ``vllm.LLM`` for a vision-language model whose media come through ``engine_input``.

    The front end's processor cache is off, since its processor is not used. If this run's pixel budgets
    differ from the processor's own, vLLM is told the largest, because it profiles memory and sizes its cache
    of vision features for the largest item. (It takes one size for images and videos: with one per kind, its
    video processor would get the setting twice and refuse it.)
    """
    settings: dict[str, Any] = {"mm_processor_cache_gb": 0}
    if processor.budgets_changed:
        sizes = processor.sizes.values()
        settings["mm_processor_kwargs"] = {
            "size": {
                "shortest_edge": min(size["shortest_edge"] for size in sizes),
                "longest_edge": max(size["longest_edge"] for size in sizes),
            }
        }
    return settings
