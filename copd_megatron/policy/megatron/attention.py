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


class PackedAttention(MegatronModule):
    """Stands in for Megatron's core attention in the CPU layer spec."""

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
        boundaries = packed_seq_params.cu_seqlens_q.tolist()
        if self.cp_group.size() == 1:
            return self._packed(query, key, value, boundaries)
        return self._context_parallel(query, key, value, boundaries)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[b, n, s, d] from [b, n, s, d] and twice [b, g, s, d]."""
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.softmax_scale, enable_gqa=True
        )

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, boundaries: Sequence[int]) -> Tensor:
        """[t, n, d]; sequences of similar length are computed together, padded to the longest of them."""
        pieces, places = [], []
        for index, valid in _length_groups(boundaries):
            rows = torch.from_numpy(index)
            gathered = [x[rows].transpose(1, 2) for x in (query, key, value)]  # [b, heads, s, d]
            output = self._attend(*gathered).transpose(1, 2)
            pieces.append(output[torch.from_numpy(valid)])
            places.append(index[valid])
        order = np.argsort(np.concatenate(places))
        return torch.cat(pieces)[torch.from_numpy(order)]

    def _context_parallel(
        self, query: Tensor, key: Tensor, value: Tensor, boundaries: Sequence[int]
    ) -> Tensor:
        """As ``_packed``, of this rank's tokens. Every rank gathers and computes the whole: right, not fast.
        Transformer Engine's ring attention is what a GPU runs."""
        size, rank = self.cp_group.size(), self.cp_group.rank()
        shards = [context_shard(boundaries, size, r) for r in range(size)]
        back = torch.from_numpy(np.argsort(np.concatenate(shards)))

        def whole(values: Tensor) -> Tensor:
            gathered = tensor_parallel.gather_from_sequence_parallel_region(
                values.contiguous(), group=self.cp_group
            )
            return gathered[back]

        attended = self._packed(whole(query), whole(key), whole(value), boundaries)
        return attended[torch.from_numpy(shards[rank])]


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
