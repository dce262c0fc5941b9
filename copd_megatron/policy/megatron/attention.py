"""Core attention for the CPU: causal, grouped-query, for padded and for packed sequences.

Megatron's own ``DotProductAttention`` refuses packed sequences and leaves them to Transformer Engine, which
needs a GPU. This module takes the same arguments and honours ``PackedSeqParams`` through torch's scaled dot
product attention, so that packing and context parallelism run in tests as they do on a GPU.

Shape legend: ``t`` packed tokens of this rank, ``s`` padded length, ``b`` rows, ``n`` query heads and ``g``
key/value heads of this tensor-parallel rank, ``d`` head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from copd_megatron.policy.batch.context import context_shard
from copd_megatron.policy.batch.spread import Spread
from copd_megatron.policy.megatron.media_sequences import MediaSeqParams


class PackedAttention(MegatronModule):
    """Stands in for Megatron's core attention in the CPU layer spec."""

    spreads = True
    """It brings the rows of a pack with shared prompts together itself (``turning``)."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        if config.attention_dropout:
            raise ValueError(f"attention_dropout={config.attention_dropout}: this attention has no dropout")
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self.cp_group = groups.cp
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Causal attention within each sequence.

        Args:
            query: [s, b, n, d], or [t, n, d] with ``packed_seq_params``; ``key`` and ``value`` likewise with
                g heads.
            attention_mask: must be None: rows are padded on the right, which causality hides.

        Returns:
            [s, b, n * d], or [t, n, d].
        """
        assert attention_mask is None and attention_bias is None, "causal attention only"
        if packed_seq_params is None:
            rows = [x.permute(1, 2, 0, 3) for x in (query, key, value)]
            return self._attend(*rows).permute(2, 0, 1, 3).flatten(2)
        plan = LengthGroups.of(packed_seq_params)
        if self.cp_group.size() == 1:
            return self._packed(query, key, value, plan)
        return self._context_parallel(query, key, value, plan)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[b, n, s, d] from [b, n, s, d] and twice [b, g, s, d]."""
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.softmax_scale, enable_gqa=True
        )

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, plan: LengthGroups) -> Tensor:
        """[t, n, d]; sequences of similar length are computed together, padded to the longest of them."""
        parts = plan.spread(query, read_once=True), plan.spread(key), plan.spread(value)
        groups = zip(*parts, strict=True)
        return plan.collect(
            [self._attend(*(rows.transpose(1, 2) for rows in group)).transpose(1, 2) for group in groups]
        )

    def _context_parallel(self, query: Tensor, key: Tensor, value: Tensor, plan: LengthGroups) -> Tensor:
        """As ``_packed``, of this rank's tokens. Every rank gathers and computes the whole: right, not fast.
        Transformer Engine's ring attention is what a GPU runs."""
        size, rank = self.cp_group.size(), self.cp_group.rank()
        shards = [context_shard(plan.boundaries, size, r) for r in range(size)]
        back = torch.from_numpy(np.argsort(np.concatenate(shards)))

        def whole(values: Tensor) -> Tensor:
            gathered = tensor_parallel.gather_from_sequence_parallel_region(
                values.contiguous(), group=self.cp_group
            )
            return gathered[back]

        attended = self._packed(whole(query), whole(key), whole(value), plan)
        return attended[torch.from_numpy(shards[rank])]


@dataclass(frozen=True, kw_only=True)
class LengthGroups:
    """How the sequences of a pack are brought into rows of similar length, and back."""

    boundaries: Sequence[int]
    """[sequences + 1] of the whole sequences."""
    shapes: Sequence[tuple[int, int]]
    """(rows, length) of each group; the groups have M places together."""
    moves: Spread | None
    """The pack's tokens among these places; None: the pack's order is that of the places.

    What only fills up a row has no gradient: no other token sees it under causal attention, and what it
    becomes is dropped."""

    @classmethod
    def of(cls, packed: PackedSeqParams) -> LengthGroups:
        """Those of a pack; made for its first layer, and kept with it for the others."""
        kept: LengthGroups | None = getattr(packed, "groups", None)
        if kept is None:
            shared: Spread | None = getattr(packed, "spread", None)
            tokens = None if shared is None else shared.index.numpy()
            kept = cls.at(packed.cu_seqlens_q.tolist(), tokens)
            if isinstance(packed, MediaSeqParams):
                packed.groups = kept
        return kept

    @classmethod
    def at(cls, boundaries: Sequence[int], tokens: np.ndarray | None = None) -> LengthGroups:
        """Those of sequences that begin and end at ``boundaries``; ``tokens`` are theirs among the pack's,
        None: the pack's, in order."""
        groups = _length_groups(boundaries)
        index = np.concatenate([rows.ravel() for rows, _ in groups])
        valid = np.concatenate([used.ravel() for _, used in groups])
        if tokens is not None:
            index = tokens[index]
        as_it_is = bool(valid.all()) and np.array_equal(index, np.arange(len(index)))
        return cls(
            boundaries=boundaries,
            shapes=[(rows.shape[0], rows.shape[1]) for rows, _ in groups],
            moves=None if as_it_is else Spread.at(index, ~valid),
        )

    def spread(self, values: Tensor, *, read_once: bool = False) -> list[Tensor]:
        """[t, heads, d] to each group's [rows, length, heads, d] (``read_once``: see ``Spread.spread``)."""
        if self.moves is not None:
            values = self.moves.spread(values, read_once=read_once)
        parts = values.split([rows * length for rows, length in self.shapes])
        return [part.unflatten(0, shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def collect(self, groups: Sequence[Tensor]) -> Tensor:
        """The inverse of ``spread``: [t, heads, d]."""
        values = (
            torch.cat([group.flatten(0, 1) for group in groups])
            if len(groups) > 1
            else groups[0].flatten(0, 1)
        )
        return values if self.moves is None else self.moves.collect(values)


def _length_groups(boundaries: Sequence[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Sequences whose lengths lie within a factor of two, each group as (token index [b, s], valid [b, s]).
    Invalid places repeat the sequence's last token."""
    starts = np.asarray(boundaries[:-1], dtype=np.int64)
    lengths = np.diff(np.asarray(boundaries, dtype=np.int64))
    kinds = np.ceil(np.log2(np.maximum(lengths, 1))).astype(np.int64)
    groups = []
    for kind in np.unique(kinds[lengths > 0]):
        members = np.flatnonzero((kinds == kind) & (lengths > 0))
        offsets = np.arange(lengths[members].max())
        valid = offsets[None] < lengths[members, None]
        index = starts[members, None] + np.minimum(offsets[None], lengths[members, None] - 1)
        groups.append((index, valid))
    return groups
