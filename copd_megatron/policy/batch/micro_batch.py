"""Rows of different lengths to one micro-batch, and back to per-token values.

Packed: rows lie behind each other in one row of ``s`` tokens, and attention is told where each begins. Rows
that share a prompt follow it one after another, and attention is told which tokens make up each row.
Padded: rows are left-aligned in ``b`` rows of ``s`` tokens. Either way padding follows a row's tokens: under
causal attention nothing that counts sees it.

Shape legend: ``b`` rows (1 when packed), ``s`` length, ``N`` response tokens of all rows, ``n`` those whose
predicting state this context-parallel rank holds (all of them without context parallelism), ``S`` and
``s_`` likewise for asked-for states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from copd_megatron.policy.batch.context import context_shard
from copd_megatron.policy.batch.positions import VisionBatch, multimodal_positions
from copd_megatron.policy.batch.spread import Spread
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
class Arrangement:
    """How rows are laid out in a micro-batch."""

    packed: bool = True
    cp_size: int = 1
    cp_rank: int = 0
    multiple: int = 1
    """Tokens on a context-parallel rank come to a multiple of this (sequence parallelism splits them over
    tensor-parallel ranks, FP8 kernels want whole tiles)."""

    def __post_init__(self) -> None:
        if self.cp_size > 1 and not self.packed:
            raise ValueError(
                "context parallelism splits packed sequences only: set training.sequence_packing"
            )

    def padded_length(self, length: int) -> int:
        """What one row takes up in a pack: context parallelism cuts it into 2 x cp equal chunks."""
        return length if self.cp_size == 1 else _round_up(length, 2 * self.cp_size)

    def total_length(self, length: int) -> int:
        """What a pack (or a padded row) of this many tokens is filled up to, over all ranks."""
        unit = self.multiple * self.cp_size
        return _round_up(length, math.lcm(unit, 2 * self.cp_size) if self.cp_size > 1 else unit)


@dataclass(frozen=True, kw_only=True)
class Boundaries:
    """Where the sequences of a pack begin and end, over all context-parallel ranks."""

    cu_seqlens: Tensor
    """[sequences + 1] int32; padding belongs to the sequence before it, or is a sequence of its own at the
    end."""
    max_length: int
    spread: Spread | None = None
    """Where prompts are shared, the whole sequences' tokens among those of the pack: it is these sequences
    that ``cu_seqlens`` bounds. None: the pack is its sequences, one behind the other."""


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """One micro-batch on the actor's device."""

    rows: tuple[int, ...]
    """Row numbers in the caller's list, in batch order."""
    input_ids_bs: Tensor
    """[b, s] int64; of this context-parallel rank"""
    position_ids: Tensor
    """[b, s] int64, for a vision-language model [3, b, s] (time, height, width); of this context-parallel
    rank"""
    boundaries: Boundaries | None
    """None: padded."""
    vision: VisionBatch | None
    """The media of all rows; None where there are none."""
    hidden_index_n: Tensor
    """[n] int64: which row of the [s * b, H] hidden states predicts each response token."""
    targets_n: Tensor
    """[n] int64"""
    place_n: Tensor | None
    """[n] int64 in 0..N-1: which response token; None: all of them in order (n = N)."""
    row_index_n: Tensor
    """[N] int64 in 0..b-1: place in ``rows``"""
    state_index: Tensor
    """[s_] int64: hidden-state rows of the states on which full distributions are asked."""
    state_place: Tensor | None
    """[s_] int64 in 0..S-1; None: all of them in order."""
    num_states: int
    """S"""
    support_nk: Tensor | None = None
    """[n, k] int64 ids whose log-probabilities are asked at each response token; None: none are."""


def build_micro_batch(
    rows: Sequence[int],
    sequences: Sequence[Sequenced],
    *,
    device: torch.device,
    arrangement: Arrangement | None = None,
    at_least: int = 1,
    states: Sequence[Sequence[int]] | None = None,
    vision: Vision | None = None,
    support: Sequence[IntArray] | None = None,
    prompt_keys: Sequence[Hashable] | None = None,
) -> MicroBatch:
    """Lays out the named rows of ``sequences`` (``arrangement`` None: packed, on one context-parallel rank).

    A pack is filled up to ``at_least`` tokens. ``states`` gives, per sequence of the full list, response
    positions whose full distribution is wanted, ``support`` ids [R, k] whose log-probabilities are. No rows
    make a micro-batch of one token and no targets, so that a rank without work still takes part in the
    collectives. In a pack, rows that follow one another and have one key in ``prompt_keys`` (one per sequence
    of the full list; None: all differ) share their prompt's tokens.
    """
    arrangement = arrangement or Arrangement()
    lengths = [len(sequences[row].token_ids) for row in rows] or [1]
    shared = [0] * len(lengths)
    """Tokens at a row's beginning that stand in the pack already, as the row's before."""
    if arrangement.packed and prompt_keys is not None:
        for place, (before, row) in enumerate(pairwise(rows), start=1):
            if prompt_keys[row] == prompt_keys[before]:
                shared[place] = sequences[row].prompt_length
    if arrangement.packed:
        frame = _pack(lengths, arrangement, at_least, shared)
    else:
        frame = _pad(lengths, arrangement)
    ids = np.zeros(frame.num_places, dtype=np.int64)
    hidden, targets, index, state_hidden = [], [], [], []
    for place, row in enumerate(rows):
        tokens, prompt = np.asarray(sequences[row].token_ids), sequences[row].prompt_length
        places = frame.places[place]
        ids[places[: len(tokens)]] = tokens
        # the logits at position t - 1 predict token t
        hidden.append(places[prompt - 1 : len(tokens) - 1])
        targets.append(tokens[prompt:])
        index.append(np.full(len(tokens) - prompt, place))
        if states is not None:
            state_hidden.append(places[np.asarray(states[row], dtype=np.int64) + prompt - 1])

    local, ours = _owned(_flat(hidden), frame)
    local_states, our_states = _owned(_flat(state_hidden), frame)
    positions = np.zeros(frame.num_places, dtype=np.int64)
    for places in frame.places:
        positions[places] = np.arange(len(places))
    media: VisionBatch | None = None
    axes: tuple[np.ndarray, ...] = ()
    if vision is not None:
        axes, media = _with_vision(rows, sequences, vision, positions, frame, shared, device)
        if frame.held is not None:
            axes = tuple(axis[frame.held] for axis in axes)

    def send(array: np.ndarray) -> Tensor:
        return _tensor(array).to(device)

    def by_row(places: np.ndarray) -> Tensor:
        """Hidden states are [s, b, H]: places run over b fastest, tokens are given as [b, s]."""
        return send(places.reshape(-1, frame.stride).T)

    partial = frame.held is not None
    return MicroBatch(
        rows=tuple(rows),
        input_ids_bs=by_row(ids if frame.held is None else ids[frame.held]),
        position_ids=by_row(positions if frame.held is None else positions[frame.held])
        if vision is None
        else torch.stack([by_row(axis) for axis in axes]),
        boundaries=None
        if frame.boundaries is None
        else Boundaries(
            cu_seqlens=torch.tensor(frame.boundaries, dtype=torch.int32, device=device),
            max_length=int(max(np.diff(frame.boundaries))),
            spread=Spread.at(np.concatenate(frame.places), device=device) if any(shared) else None,
        ),
        vision=media,
        hidden_index_n=send(local),
        targets_n=send(_flat(targets)[ours]),
        place_n=send(ours) if partial else None,
        row_index_n=send(_flat(index)),
        state_index=send(local_states),
        state_place=send(our_states) if partial else None,
        num_states=sum(len(part) for part in state_hidden),
        support_nk=None if support is None else send(_support(rows, support)[ours]),
    )


def _support(rows: Sequence[int], support: Sequence[IntArray]) -> np.ndarray:
    """[N, k] ids at the response tokens of the named rows."""
    width = support[0].shape[1] if len(support) else 0
    return np.concatenate([np.zeros((0, width), dtype=np.int64), *(support[row] for row in rows)])


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """Where the tokens of each row stand among the ``num_places`` places of a micro-batch."""

    num_places: int
    places: Sequence[np.ndarray]
    """Of each row's tokens, then of the padding that belongs to it; at the end perhaps of a row that is only
    padding."""
    stride: int
    boundaries: list[int] | None = None
    held: np.ndarray | None = None
    """Places of this context-parallel rank; None: all."""


def _pad(lengths: Sequence[int], arrangement: Arrangement) -> _Frame:
    b, s = len(lengths), arrangement.total_length(max(lengths))
    return _Frame(num_places=b * s, places=[row + np.arange(s) * b for row in range(b)], stride=b)


def _pack(lengths: Sequence[int], arrangement: Arrangement, at_least: int, shared: Sequence[int]) -> _Frame:
    """``shared`` tokens of each row are those at the beginning of the row before."""
    places: list[np.ndarray] = []
    end = 0
    for length, common in zip(lengths, shared, strict=True):
        own = np.arange(end, end + arrangement.padded_length(length) - common)
        places.append(np.concatenate([places[-1][:common], own]) if common else own)
        end += len(own)
    total = arrangement.total_length(max(end, at_least))
    if total > end:
        places.append(np.arange(end, total))
    boundaries = [0, *np.cumsum([len(row) for row in places]).tolist()]
    held = None
    if arrangement.cp_size > 1:
        if any(shared):
            raise ValueError("context parallelism splits rows that stand whole in the pack")
        held = context_shard(boundaries, arrangement.cp_size, arrangement.cp_rank)
    return _Frame(num_places=total, places=places, stride=1, boundaries=boundaries, held=held)


def _owned(places: np.ndarray, frame: _Frame) -> tuple[np.ndarray, np.ndarray]:
    """(rows of this rank's hidden states, which of ``places`` they are)."""
    if frame.held is None:
        return places, np.arange(len(places))
    here = np.full(frame.num_places, -1, dtype=np.int64)
    here[frame.held] = np.arange(len(frame.held))
    ours = np.flatnonzero(here[places] >= 0)
    return here[places][ours], ours


def _with_vision(
    rows: Sequence[int],
    sequences: Sequence[Sequenced],
    vision: Vision,
    positions: np.ndarray,
    frame: _Frame,
    shared: Sequence[int],
    device: torch.device,
) -> tuple[tuple[np.ndarray, ...], VisionBatch | None]:
    """Multimodal positions, one array [places] per axis, and the media of a micro-batch."""
    axes = tuple(positions.copy() for _ in range(3))
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
        own = multimodal_positions(
            tokens,
            image_token_id=vision.image_token_id,
            video_token_id=vision.video_token_id,
            image_grid_thw=image_grid,
            video_grid_thw=video_grid,
            spatial_merge_size=vision.spatial_merge_size,
            prompt_length=sequences[row].prompt_length,
        )
        for axis, values in zip(axes, own, strict=True):
            axis[frame.places[place][: len(tokens)]] = values
        if shared[place]:
            continue  # the row before has brought the media
        prompt = tokens[: sequences[row].prompt_length]
        for patches, grid, token_id in (
            (features.pixel_values, image_grid, vision.image_token_id),
            (features.pixel_values_videos, video_grid, vision.video_token_id),
        ):
            if patches is not None and len(grid):
                pixels.append(patches)
                grids.append(grid)
                scatter.append(frame.places[place][np.flatnonzero(prompt == token_id)])
    if not pixels:
        return axes, None
    local, ours = _owned(_flat(scatter), frame)
    return axes, VisionBatch(
        pixel_values=torch.from_numpy(np.concatenate(pixels)).to(device),
        grid_thw=torch.from_numpy(np.concatenate(grids).astype(np.int64)).to(device),
        scatter_index=_tensor(local).to(device),
        taken=None if frame.held is None else _tensor(ours).to(device),
    )


def _flat(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, dtype=np.int64)


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
