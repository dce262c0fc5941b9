"""What a decoder layer computes between its matrix products, in as few passes over memory as torch allows.

On a CPU, where nothing fuses them, these take a third of a small model's update. Each is the same formula as
Megatron's or torch's own; the backward passes are written out, so that no intermediate result is kept or made
twice.

Shape legend: ``t`` tokens, ``n`` heads, ``d`` head size, ``f`` feed-forward width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Turn:
    """Rotary embedding of a pack's tokens: ``t cos + rotate_half(t) sin``."""

    cosine: Tensor
    """[t, 1, d]"""
    sine: Tensor
    """[t, 1, d], its first half negated, so that halves only have to change places."""

    @classmethod
    def by(cls, angles: Tensor, dtype: torch.dtype) -> Turn:
        """``angles`` [t, 1, d] in radians."""
        sine = angles.sin()
        half = angles.shape[-1] // 2
        return cls(angles.cos().to(dtype), torch.cat([-sine[..., :half], sine[..., half:]], dim=-1).to(dtype))

    def __call__(self, heads: Tensor) -> Tensor:
        """``heads`` [t, n, d], turned."""
        turned: Tensor = _Turn.apply(heads, self.cosine, self.sine)
        return turned


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return (heads * cosine).addcmul_(_halves_exchanged(heads), sine)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cosine, sine = ctx.saved_tensors
        return (grads[0] * cosine).add_(_halves_exchanged(grads[0] * sine)), None, None


def _halves_exchanged(values: Tensor) -> Tensor:
    return torch.cat(values.chunk(2, dim=-1)[::-1], dim=-1)


class Swiglu(nn.Module):
    """``silu(x_1) x_2`` of the two halves of [..., 2 f], as Megatron builds activation functions."""

    def __init__(self, *, config: Any) -> None:
        super().__init__()

    def forward(self, halves: Tensor, /) -> Tensor:
        """[..., f]"""
        gated: Tensor = _Swiglu.apply(halves)
        return gated


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, halves: Tensor) -> Tensor:
        gate, up = halves.chunk(2, dim=-1)
        opened = F.silu(gate)
        ctx.save_for_backward(halves, opened)
        return opened * up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        halves, opened = ctx.saved_tensors
        gate, up = halves.chunk(2, dim=-1)
        grad = torch.empty_like(halves)
        grad_gate, grad_up = grad.chunk(2, dim=-1)
        torch.mul(grads[0], opened, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grads[0] * up, gate, grad_input=grad_gate)
        return grad


class _RMSNorm(torch.autograd.Function):
    """y = x r w with r = 1 / sqrt(mean x^2 + eps), over the last dimension."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = values.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(values, weight, scale)
        return (values * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values, weight, scale = ctx.saved_tensors
        normed = values * scale
        product = grads[0] * normed
        # dx = r (g w - x r mean(g w x r))
        mean = (product @ weight).div_(weight.numel()).unsqueeze(-1)
        grad = (grads[0] * weight).addcmul_(normed, mean, value=-1.0).mul_(scale)
        return grad, product.flatten(0, -2).sum(dim=0), None


def rms_norm(values: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``torch.nn.functional.rms_norm`` over the last dimension, float32."""
    normed: Tensor = _RMSNorm.apply(values, weight, eps)
    return normed
