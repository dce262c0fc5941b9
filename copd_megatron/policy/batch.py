"""Rows of different lengths to one padded micro-batch, and back to per-token values.

Rows are left-aligned and padded on the right: under causal attention nothing that counts sees the padding.
Shape legend: ``b`` rows, ``s`` padded length, ``N`` response tokens of all rows, ``S`` asked-for states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from copd_megatron.records import IntArray


class Sequenced(Protocol):
    """What the forward pass needs of a row."""

    @property
    def token_ids(self) -> IntArray: ...
    @property
    def prompt_length(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """One padded micro-batch on the actor's device."""

    rows: tuple[int, ...]
    """Row numbers in the caller's list, in batch order."""
    input_ids_bs: Tensor
    """[b, s] int64"""
    position_ids_bs: Tensor
    """[b, s] int64"""
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

    def tensor(parts: list[np.ndarray]) -> Tensor:
        flat = np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, dtype=np.int64)
        return torch.from_numpy(flat).to(device)

    return MicroBatch(
        rows=tuple(rows),
        input_ids_bs=torch.from_numpy(ids).to(device),
        position_ids_bs=torch.arange(s, device=device).expand(b, s),
        hidden_index_n=tensor(hidden),
        targets_n=tensor(targets),
        row_index_n=tensor(index),
        state_index=tensor(state_hidden),
    )


def flatten(rows: Sequence[int], values: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """Per-row arrays [R] of the named rows, concatenated to [N] float32 on the device."""
    parts = [np.asarray(values[row], dtype=np.float32) for row in rows]
    flat = np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)
    return torch.from_numpy(flat).to(device)
