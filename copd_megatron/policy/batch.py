"""Rows of different lengths to one padded micro-batch, and back to per-token values.

Rows are left-aligned and padded on the right: under causal attention nothing that counts sees the padding.
Shape legend: ``b`` rows, ``s`` padded length, ``N`` response tokens of all rows, ``S`` asked-for states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from copd_megatron.policy.positions import VisionBatch, multimodal_positions
from copd_megatron.records import FloatArray, IntArray


class Sequenced(Protocol):
    """What the forward pass needs of a row."""

    @property
    def token_ids(self) -> IntArray: ...
    @property
    def prompt_length(self) -> int: ...


class Features(Protocol):
    """The processed media of one row, as the processor made them (``data.processing``)."""

    @property
    def pixel_values(self) -> FloatArray | None: ...
    @property
    def image_grid_thw(self) -> IntArray | None: ...
    @property
    def pixel_values_videos(self) -> FloatArray | None: ...
    @property
    def video_grid_thw(self) -> IntArray | None: ...


@dataclass(frozen=True, kw_only=True)
class Vision:
    """How a vision-language model wants its micro-batches."""

    image_token_id: int
    video_token_id: int
    spatial_merge_size: int
    features: Callable[[Any], Features | None]
    """The media of a row; None where it has none."""


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """One padded micro-batch on the actor's device."""

    rows: tuple[int, ...]
    """Row numbers in the caller's list, in batch order."""
    input_ids_bs: Tensor
    """[b, s] int64"""
    position_ids: Tensor
    """[b, s] int64, or [3, b, s] (time, height, width) for a vision-language model"""
    vision: VisionBatch | None
    """The media of all rows; None where there are none."""
    hidden_index_n: Tensor
    """[N] int64: which row of the [s * b, H] hidden states predicts each response token."""
    targets_n: Tensor
    """[N] int64"""
    row_index_n: Tensor
    """[N] int64 in 0..b-1"""
    state_index: Tensor
    """[S] int64: hidden-state rows of the states on which full distributions are asked."""


def build_micro_batch(
    rows: Sequence[int],
    sequences: Sequence[Sequenced],
    *,
    device: torch.device,
    states: Sequence[Sequence[int]] | None = None,
    vision: Vision | None = None,
) -> MicroBatch:
    """Pads the named rows of ``sequences``.

    ``states[row]`` lists response positions (0 .. R-1) of a row. An empty ``rows`` gives a dummy of one
    token and no targets, so that a rank without work still takes part in the collectives.
    """
    lengths = [len(sequences[row].token_ids) for row in rows] or [1]
    b, s = len(lengths), max(lengths)
    ids = np.zeros((b, s), dtype=np.int64)
    hidden, targets, index, state_hidden = [], [], [], []
    for place, row in enumerate(rows):
        tokens, prompt = np.asarray(sequences[row].token_ids), sequences[row].prompt_length
        ids[place, : len(tokens)] = tokens
        response = tokens[prompt:]
        # the logits at position t - 1 predict token t; hidden states are [s, b, H]
        hidden.append((np.arange(prompt, len(tokens)) - 1) * b + place)
        targets.append(response)
        index.append(np.full(len(response), place))
        if states is not None:
            state_hidden.append((np.asarray(states[row], dtype=np.int64) + prompt - 1) * b + place)

    positions, media = torch.arange(s).expand(b, s), None
    if vision is not None:
        positions, media = _with_vision(rows, sequences, vision, b, s, device)

    def tensor(parts: list[np.ndarray]) -> Tensor:
        flat = np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, dtype=np.int64)
        return torch.from_numpy(flat).to(device)

    return MicroBatch(
        rows=tuple(rows),
        input_ids_bs=torch.from_numpy(ids).to(device),
        position_ids=positions.to(device),
        vision=media,
        hidden_index_n=tensor(hidden),
        targets_n=tensor(targets),
        row_index_n=tensor(index),
        state_index=tensor(state_hidden),
    )


def _with_vision(
    rows: Sequence[int], sequences: Sequence[Sequenced], vision: Vision, b: int, s: int, device: torch.device
) -> tuple[Tensor, VisionBatch | None]:
    """Multimodal positions [3, b, s] and the media of a micro-batch."""
    positions = np.broadcast_to(np.arange(s), (3, b, s)).copy()
    pixels: list[FloatArray] = []
    grids: list[IntArray] = []
    scatter: list[np.ndarray] = []
    for place, row in enumerate(rows):
        tokens = np.asarray(sequences[row].token_ids)
        features = vision.features(sequences[row])
        if features is None:
            continue
        empty = np.zeros((0, 3), dtype=np.int32)
        image_grid = empty if features.image_grid_thw is None else features.image_grid_thw
        video_grid = empty if features.video_grid_thw is None else features.video_grid_thw
        positions[:, place, : len(tokens)] = multimodal_positions(
            tokens,
            image_token_id=vision.image_token_id,
            video_token_id=vision.video_token_id,
            image_grid_thw=image_grid,
            video_grid_thw=video_grid,
            spatial_merge_size=vision.spatial_merge_size,
            prompt_length=sequences[row].prompt_length,
        )
        prompt = tokens[: sequences[row].prompt_length]
        for values, grid, token_id in (
            (features.pixel_values, image_grid, vision.image_token_id),
            (features.pixel_values_videos, video_grid, vision.video_token_id),
        ):
            if values is not None and len(grid):
                pixels.append(values)
                grids.append(grid)
                scatter.append(np.flatnonzero(prompt == token_id) * b + place)
    ids = torch.from_numpy(positions)
    if not pixels:
        return ids, None
    return ids, VisionBatch(
        pixel_values=torch.from_numpy(np.concatenate(pixels)).to(device),
        grid_thw=torch.from_numpy(np.concatenate(grids).astype(np.int64)).to(device),
        scatter_index=torch.from_numpy(np.concatenate(scatter).astype(np.int64)).to(device),
    )


def flatten(rows: Sequence[int], values: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """Per-row arrays [R] of the named rows, concatenated to [N] float32 on the device."""
    parts = [np.asarray(values[row], dtype=np.float32) for row in rows]
    flat = np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)
    return torch.from_numpy(flat).to(device)
