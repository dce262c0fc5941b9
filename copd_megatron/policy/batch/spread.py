"""Tokens of a pack brought to other places, some of them to several, and back.

Shape legend: ``t`` tokens of the pack, ``M`` places, ``c`` places of one token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Which token stands at which place. Every token stands somewhere."""

    index: Tensor
    """[M] int64: the token at each place."""
    first: Tensor
    """[t] int64: the first place of each token, which alone is brought back."""
    repeats: Sequence[tuple[Tensor, Tensor]]
    """Tokens that stand at several places, [n] int64, and their other places, [n, c - 1]; one pair for each
    number of places."""
    unused: Tensor | None
    """[M] bool: places that are not brought back; None: all are."""

    @classmethod
    def at(cls, index: np.ndarray, fills: np.ndarray | None = None, *, device: Any = "cpu") -> Spread:
        """For ``index`` [M].

        ``fills`` [M] bool marks places that only fill up: nobody reads what is made there, and their
        gradient counts as nothing.
        """
        kept = np.arange(len(index)) if fills is None else np.flatnonzero(~fills)
        order = kept[np.argsort(index[kept], kind="stable")]
        counts = np.bincount(index[kept])
        starts = np.cumsum(counts) - counts
        first = order[starts]
        repeats = []
        for count in np.unique(counts[counts > 1]):
            tokens = np.flatnonzero(counts == count)
            others = order[starts[tokens][:, None] + np.arange(1, count)]
            repeats.append((_tensor(tokens, device), _tensor(others, device)))
        unused = np.ones(len(index), dtype=bool)
        unused[first] = False
        return cls(
            index=_tensor(index, device),
            first=_tensor(first, device),
            repeats=repeats,
            unused=torch.from_numpy(unused).to(device) if unused.any() else None,
        )

    def spread(self, values: Tensor, *, read_once: bool = False) -> Tensor:
        """[t, ...] to [M, ...]. ``read_once``: what is made of a token is taken from its first place alone,
        as of a query, so that its other places have no gradient."""
        repeats = () if read_once else self.repeats
        moved: Tensor = _Moved.apply(values, self.index, self.first, None, repeats)
        return moved

    def collect(self, values: Tensor) -> Tensor:
        """[M, ...] to [t, ...]."""
        moved: Tensor = _Moved.apply(values, self.first, self.index, self.unused, ())
        return moved


class _Moved(torch.autograd.Function):
    """Rows of a tensor, chosen by index. The backward pass chooses as well, where torch would add row by row:
    ``back`` says which row of the result has a source's gradient, ``nothing`` which sources have none, and
    ``repeats`` which further rows belong to it."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        index: Tensor,
        back: Tensor,
        nothing: Tensor | None,
        repeats: Sequence[tuple[Tensor, Tensor]],
    ) -> Tensor:
        ctx.save_for_backward(back, nothing, *(part for pair in repeats for part in pair))
        return values.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        back, nothing, *flat = ctx.saved_tensors
        grad = grads[0].index_select(0, back)
        if nothing is not None:
            grad[nothing] = 0.0
        for tokens, others in zip(flat[::2], flat[1::2], strict=True):
            more = grads[0].index_select(0, others.flatten()).unflatten(0, others.shape).sum(dim=1)
            grad.index_add_(0, tokens, more)
        return grad, None, None, None, None


def _tensor(array: np.ndarray, device: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(device)
