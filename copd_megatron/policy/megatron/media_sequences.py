"""What a pack takes along to every layer: rotary angles, shared prompts, deepstack features.

Megatron's rotary embedding of a pack counts each sequence's positions from 0 in its fused kernel, which is
wrong for images; its unfused one takes a tensor apart by sequence lengths, which it fetches from the device
once a sequence, for queries and keys, in every layer. Here the angles of all tokens of this rank come with
the pack, and attention turns queries and keys in one call, fused where Transformer Engine is.

Megatron hands a pack's boundaries to every layer, also to one that is computed again in the backward pass;
what the layers need goes with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from copd_megatron.policy.batch.spread import Spread
from copd_megatron.policy.megatron.few_passes import Turn


@dataclass(frozen=True, kw_only=True)
class Deepstack:
    """What one micro-batch adds to the hidden states inside the first decoder layers."""

    features: Sequence[Tensor]
    """[m, H] per layer."""
    scatter_index: Tensor
    """[m] places in the flattened [s * b] hidden states."""


@dataclass
class MediaSeqParams(PackedSeqParams):
    """A pack's boundaries and, of a vision-language model, what its layers need besides."""

    deepstack: Deepstack | None = None
    """None: no media, or not on this pipeline stage."""
    angles: Tensor | None = None
    """[t, 1, 1, head_dim] of this rank's tokens; None: the layers have them from Megatron."""
    turn: Turn | None = None
    """The same as cosines and sines; made by the first layer that turns without a fused kernel."""
    spread: Spread | None = None
    """Where prompts are shared, the tokens of the whole sequences, which the boundaries bound; None: the pack
    is its sequences."""
    groups: Any = None
    """What attention without a fused kernel has worked out of the boundaries (``attention.LengthGroups``)."""


@cache
def turning(attention: type[Any]) -> type[Any]:
    """Core attention (Megatron's interface) that first turns queries and keys by a pack's angles, and that
    sees the rows of shared prompts whole."""
    itself: bool = getattr(attention, "spreads", False)

    class Turning(attention):
        def forward(
            self,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            *args: Any,
            packed_seq_params: MediaSeqParams | None = None,
            **kwargs: Any,
        ) -> Any:
            """``query`` [t, n, d], ``key`` and ``value`` [t, g, d] of a pack; otherwise as they are."""
            packed = packed_seq_params
            if packed is None:
                return super().forward(query, key, value, *args, **kwargs)
            query, key = self.turned(query, packed), self.turned(key, packed)
            spread = None if itself else packed.spread
            if spread is None:
                return super().forward(query, key, value, *args, packed_seq_params=packed, **kwargs)
            query, key, value = spread.spread(query, read_once=True), spread.spread(key), spread.spread(value)
            attended = super().forward(query, key, value, *args, packed_seq_params=packed, **kwargs)
            return spread.collect(attended)

        def turned(self, heads: Tensor, packed: MediaSeqParams) -> Tensor:
            assert packed.angles is not None
            if self.config.apply_rope_fusion:
                return apply_rotary_pos_emb(heads.unsqueeze(1), packed.angles, config=self.config).squeeze(1)
            if packed.turn is None:
                packed.turn = Turn.by(packed.angles.squeeze(2), heads.dtype)
            return packed.turn(heads)

    return Turning
