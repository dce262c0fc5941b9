"""Attention within the vision tower: all images of a micro-batch at once.

transformers' tower, without the flash-attn package, attends to every image and every frame group in a loop
of its own, in each layer: hundreds of small calls for a batch of videos. Here sequences of equal length,
which is what the frames of videos and the images of one size are, go through one call together.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

_NAME = "packed_flash"
"""With "flash" in it transformers hands over all sequences of a batch and where each begins."""


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    cu_seq_lens_q: Tensor,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Full attention within each of the sequences packed one behind the other.

    ``query``, ``key``, ``value``: [1, heads, P, head_dim]; ``cu_seq_lens_q`` [N + 1]: where each sequence
    begins, and P. Returns ([1, P, heads, head_dim], None), as transformers' attention functions do.

    The signature is transformers' (``ALL_ATTENTION_FUNCTIONS``); ``attention_mask`` is None here.
    """

    def attend(length: int, *parts: Tensor) -> Tensor:
        """Sequences of one length, one behind the other; [heads, n * length, head_dim] each."""
        q, k, v = (part.unflatten(1, (-1, length)).transpose(0, 1) for part in parts)
        seen = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling)
        return seen.transpose(0, 1).flatten(1, 2)

    groups = _by_length(cu_seq_lens_q)
    if len(groups) == 1:
        output = attend(groups[0][0], query[0], key[0], value[0])
    else:
        output = torch.zeros_like(query[0])
        for size, here in groups:
            output = output.index_copy(
                1, here, attend(size, query[0, :, here], key[0, :, here], value[0, :, here])
            )
    return output[None].transpose(1, 2), None


def _by_length(cu_seq_lens: Tensor) -> list[tuple[int, Tensor]]:
    """Each length of a sequence, and the patches [n * length] of all sequences that have it. Every layer gets
    the same tensor, so that the device is asked once for all of them."""
    known: list[tuple[int, Tensor]] | None = getattr(cu_seq_lens, "_copd_by_length", None)
    if known is None:
        bounds = cu_seq_lens.tolist()
        begins: dict[int, list[int]] = {}
        for begin, end in itertools.pairwise(bounds):
            if end > begin:
                begins.setdefault(end - begin, []).append(begin)
        known = [
            (size, (torch.tensor(found)[:, None] + torch.arange(size)).flatten().to(cu_seq_lens.device))
            for size, found in sorted(begins.items())
        ]
        cu_seq_lens._copd_by_length = known  # type: ignore[attr-defined]
    return known


ALL_ATTENTION_FUNCTIONS.register(_NAME, packed_attention)


def use_packed_attention(tower: PreTrainedModel) -> None:
    """Have a vision tower attend with ``packed_attention``.

    Named in the config of a tower that is yet to be built, transformers would look for a kernel package.
    """
    tower.config._attn_implementation = _NAME
