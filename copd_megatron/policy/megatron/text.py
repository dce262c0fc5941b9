"""The text model where rotary embedding is not fused: a pack's angles are made once and go with the pack.

Megatron's unfused rotary embedding takes a pack apart by its sequences, in every layer, for queries and keys:
thousands of small calls for one micro-batch.
"""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt import GPTModel

from copd_megatron.policy.megatron.media_sequences import MediaSeqParams


class TextModel(GPTModel):
    """``GPTModel`` whose layers turn a pack by the angles that come with it (``turning``)."""

    def _preprocess(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        hidden, angles, *rest = super()._preprocess(*args, **kwargs)
        packed: MediaSeqParams | None = kwargs["packed_seq_params"]
        if packed is None:
            return (hidden, angles, *rest)
        packed.angles = angles.index_select(0, kwargs["position_ids"].flatten())
        return (hidden, None, *rest)
