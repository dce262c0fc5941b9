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
    bounds = cu_seq_lens_q.tolist()
    lengths = [end - begin for begin, end in itertools.pairwise(bounds)]
    output = torch.empty_like(query) if len(set(lengths)) > 1 else None
    for length in sorted(set(lengths)):
        if length == 0:
            continue
        if output is None:
            here: Tensor | slice = slice(None)
        else:
            begins = [begin for begin, size in zip(bounds, lengths, strict=False) if size == length]
            here = (torch.tensor(begins)[:, None] + torch.arange(length)).flatten().to(query.device)
        # [N', heads, length, head_dim]
        q, k, v = (
            part[0, :, here].unflatten(1, (-1, length)).transpose(0, 1) for part in (query, key, value)
        )
        seen = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling)
        flat = seen.transpose(0, 1).flatten(1, 2)[None]
        output = flat if output is None else output.index_copy(2, here, flat)
    if output is None:
        output = torch.empty_like(query)
    return output.transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(_NAME, packed_attention)


def use_packed_attention(tower: PreTrainedModel) -> None:
    """Have a vision tower attend with ``packed_attention``.

    Named in the config of a tower that is yet to be built, transformers would look for a kernel package.
    """
    tower.config._attn_implementation = _NAME
