"""What a scoring pass says of its sequences, collected over micro-batches and ranks.

Shape legend: ``R`` response tokens of a sequence, ``S`` states asked for, ``V`` vocabulary, ``k`` ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from copd_megatron.policy.batch.micro_batch import MicroBatch, Sequenced
from copd_megatron.policy.head import VocabShard
from copd_megatron.records import FloatArray, TopK


@dataclass(frozen=True, kw_only=True)
class SequenceScore:
    """What the actor says about one sequence."""

    logprobs: FloatArray
    """[R] of the response tokens, at the sampling temperature."""
    entropy: FloatArray
    """[R] nats"""
    state_logprobs: FloatArray
    """[S, V] full distributions at the asked-for response positions."""
    top: TopK | None = None
    """[R, k] the likeliest ids; None: not asked for."""
    support_logprobs: FloatArray | None = None
    """[R, k] at the ids asked about, 0 in empty places; None: not asked for."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a scoring pass computes beside each token's log-probability and entropy."""

    temperature: float
    top_k: int = 0


class ScoreSheet:
    """Room for all sequences' scores. Ranks write what they own; the rest is zero until ``reduce``."""

    def __init__(
        self,
        sequences: Sequence[Sequenced],
        states: Sequence[Sequence[int]] | None,
        *,
        top_k: int,
        support_k: int,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        lengths = [len(seq.token_ids) - seq.prompt_length for seq in sequences]
        self._rows = [slice(*ends) for ends in pairwise(np.cumsum([0, *lengths]).tolist())]
        self._num_states = [len(s) for s in states] if states is not None else [0] * len(sequences)
        self._states = [slice(*ends) for ends in pairwise(np.cumsum([0, *self._num_states]).tolist())]
        widths = {
            "tokens": (2, torch.float32),
            "top_ids": (top_k, torch.int32),
            "top_logprobs": (top_k, torch.float32),
            "support": (support_k, torch.float32),
        }
        self._by_token = {
            name: torch.zeros(sum(lengths), width, dtype=dtype, device=device)
            for name, (width, dtype) in widths.items()
            if width
        }
        self._by_state = torch.zeros(sum(self._num_states), vocab_size, device=device)

    def write_tokens(self, batch: MicroBatch, output: dict[str, Any]) -> None:
        """What a micro-batch says by token: [N, width] under each name."""
        begin = 0
        for row in batch.rows:
            place = self._rows[row]
            length = place.stop - place.start
            for name, whole in self._by_token.items():
                whole[place] = output[name][begin : begin + length]
            begin += length

    def write_states(self, batch: MicroBatch, states: torch.Tensor, shard: VocabShard) -> None:
        """What a micro-batch says by state, on one slice of the vocabulary: [S, v]."""
        begin, width = 0, states.shape[1]
        for row in batch.rows:
            target = self._by_state[self._states[row]]
            target[:, shard.start : shard.start + width] = states[begin : begin + self._num_states[row]]
            begin += self._num_states[row]

    def reduce(self) -> list[SequenceScore]:
        """One score per sequence, in order, on every rank of the branch; collective."""
        # owners hold the values, everybody else zeros: one sum brings them to every rank
        for whole in self._by_token.values():
            dist.all_reduce(whole)
        if self._by_state.numel():
            dist.all_reduce(self._by_state)
        said = {name: whole.cpu().numpy() for name, whole in self._by_token.items()}
        full = self._by_state.cpu().numpy()
        return [
            _score({name: whole[row] for name, whole in said.items()}, full[states])
            for row, states in zip(self._rows, self._states, strict=True)
        ]


def _score(said: dict[str, Any], states: FloatArray) -> SequenceScore:
    return SequenceScore(
        logprobs=np.ascontiguousarray(said["tokens"][:, 0]),
        entropy=np.ascontiguousarray(said["tokens"][:, 1]),
        state_logprobs=states,
        top=TopK(ids=said["top_ids"], logprobs=said["top_logprobs"]) if "top_ids" in said else None,
        support_logprobs=said.get("support"),
    )
