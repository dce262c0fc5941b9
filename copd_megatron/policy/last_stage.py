"""What the last pipeline stage computes of a micro-batch's hidden states, at response tokens only.

With context parallelism a rank computes the tokens whose states it holds, and all ranks of the group get all
tokens' values.

Shape legend: ``N`` response tokens of the micro-batch, ``n`` those whose states this rank holds, ``S`` states
asked for, ``k`` ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from torch import Tensor

from copd_megatron.objectives.divergence import Measure, Targets
from copd_megatron.policy.batch.context import GatherContext
from copd_megatron.policy.batch.micro_batch import MicroBatch
from copd_megatron.policy.head import (
    VocabShard,
    linear_divergence,
    linear_full_logprobs,
    linear_logprobs,
    linear_support_logprobs,
    linear_topk,
)


class Head:
    """The output layer over one micro-batch: each method applies it to the states that it needs."""

    def __init__(
        self,
        hidden: Tensor,
        weight_vh: Tensor,
        batch: MicroBatch,
        *,
        shard: VocabShard,
        temperature: float,
        chunk_tokens: int,
    ) -> None:
        """``hidden`` [tokens, H]: all hidden states of the micro-batch on this rank."""
        self._hidden, self._weight, self._batch = hidden, weight_vh, batch
        self._shard, self._temperature, self._chunk = shard, temperature, chunk_tokens

    def tokens(self) -> Tensor:
        """[N, 2] log-probability and entropy of each response token, with gradient."""
        both = linear_logprobs(
            self._states(),
            self._weight,
            self._batch.targets_n,
            shard=self._shard,
            temperature=self._temperature,
            chunk_tokens=self._chunk,
        )
        return self._gathered(torch.stack(both, dim=1))

    def states(self) -> Tensor:
        """[S, v] log-probabilities over this rank's slice of the vocabulary at the states asked for."""
        batch = self._batch
        full = linear_full_logprobs(
            self._hidden.index_select(0, batch.state_index),
            self._weight,
            shard=self._shard,
            temperature=self._temperature,
        )
        if batch.state_place is None:
            return full
        group = parallel_state.get_context_parallel_group()
        whole: Tensor = GatherContext.apply(full, batch.state_place, batch.num_states, group)
        return whole

    def top(self, k: int) -> tuple[Tensor, Tensor]:
        """Log-probabilities and ids of the k likeliest tokens at each response token, [N, k] each."""
        values, ids = linear_topk(
            self._states(),
            self._weight,
            k,
            shard=self._shard,
            temperature=self._temperature,
            chunk_tokens=self._chunk,
        )
        return self._gathered(values), self._gathered(ids)

    def support(self) -> Tensor:
        """[N, k] log-probabilities at the ids that the micro-batch asks about."""
        assert self._batch.support_nk is not None
        return self._gathered(
            linear_support_logprobs(
                self._states(),
                self._weight,
                self._batch.support_nk,
                shard=self._shard,
                temperature=self._temperature,
                chunk_tokens=self._chunk,
            )
        )

    def divergence(self, tokens: Tensor, targets: Targets, measure: Measure) -> Tensor:
        """[m] divergences of this policy from ``targets`` at m response tokens, with gradient.

        Args:
            tokens: [m] int64, distinct, ascending, out of 0 .. N - 1.
            targets: of these tokens.
        """
        place, index = self._batch.place_n, self._batch.hidden_index_n
        here = torch.arange(len(tokens), device=tokens.device)
        if place is not None:
            where = torch.full((self._batch.row_index_n.numel(),), -1, device=tokens.device)
            where[place] = torch.arange(len(place), device=tokens.device)
            here = torch.nonzero(where[tokens] >= 0).squeeze(1)
            index = index[where[tokens[here]]]
        else:
            index = index[tokens]
        values = linear_divergence(
            self._hidden.index_select(0, index),
            self._weight,
            targets[here],
            measure,
            shard=self._shard,
            temperature=self._temperature,
            chunk_tokens=self._chunk,
        )
        if place is None:
            return values
        group = parallel_state.get_context_parallel_group()
        whole: Tensor = GatherContext.apply(values, here, len(tokens), group)
        return whole

    def _states(self) -> Tensor:
        """[n, H] hidden states that predict response tokens."""
        return self._hidden.index_select(0, self._batch.hidden_index_n)

    def _gathered(self, values: Tensor) -> Tensor:
        """[n, ...] of this rank to [N, ...]."""
        batch = self._batch
        if batch.place_n is None:
            return values
        group = parallel_state.get_context_parallel_group()
        whole: Tensor = GatherContext.apply(
            values.contiguous(), batch.place_n, batch.row_index_n.numel(), group
        )
        return whole


@dataclass(frozen=True)
class Placed:
    """A micro-batch as a token loss sees it (``objectives.base.MicroBatchRows``)."""

    rows: Sequence[int]
    row_index_n: Tensor
    head: Head

    def divergence(self, tokens: Tensor, targets: Targets, measure: Measure) -> Tensor:
        """See ``Head.divergence``."""
        return self.head.divergence(tokens, targets, measure)
