"""Which tokens of a packed micro-batch a context-parallel rank holds, and their values brought together.

Each sequence is cut into ``2 * cp`` equal chunks; rank ``r`` holds chunks ``r`` and ``2 * cp - 1 - r``, one
early and one late, so that causal attention costs every rank the same (the order that Transformer Engine's
attention and Megatron's rotary embedding expect).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


def context_shard(boundaries: Sequence[int], cp_size: int, cp_rank: int) -> np.ndarray:
    """Positions in the whole pack of this rank's tokens, in the rank's order, int64.

    ``boundaries`` [sequences + 1] are where sequences begin and end in the whole pack.

    Worked example: boundaries ``[0, 8]``, ``cp_size`` 2: rank 0 holds 0 1 6 7, rank 1 holds 2 3 4 5.

    Raises:
        ValueError: a sequence's length is no multiple of ``2 * cp_size``.
    """
    if cp_size == 1:
        return np.arange(boundaries[-1], dtype=np.int64)
    parts = [np.zeros(0, dtype=np.int64)]
    for start, stop in pairwise(boundaries):
        chunk, rest = divmod(stop - start, 2 * cp_size)
        if rest:
            raise ValueError(
                f"a sequence of {stop - start} tokens cannot be split over context_parallel_size={cp_size}: "
                f"pad it to a multiple of {2 * cp_size}"
            )
        for number in (cp_rank, 2 * cp_size - 1 - cp_rank):
            first = start + number * chunk
            parts.append(np.arange(first, first + chunk, dtype=np.int64))
    return np.concatenate(parts)


class GatherContext(torch.autograd.Function):
    """Values [n, ...] of this context-parallel rank's places to values [N, ...] of all places on every rank.

    What follows is computed alike on every rank of the group; the backward pass takes this rank's places of
    the gradient [N, ...], so that each value's gradient is counted once over the group.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, place: Tensor, count: int, group: dist.ProcessGroup) -> Tensor:
        ctx.save_for_backward(place)
        whole = values.new_zeros(count, *values.shape[1:])
        whole[place] = values
        dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        return grads[0][place], None, None, None
