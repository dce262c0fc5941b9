"""The text model whose packs bring their rotary angles along, made once for all layers.

Megatron's unfused rotary embedding takes a pack apart by its sequences, in every layer, for queries and keys:
thousands of small calls for one micro-batch. Its fused one counts positions from a sequence's beginning,
which is wrong where prompts are shared.
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
