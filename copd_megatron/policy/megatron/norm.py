"""The CPU layer spec's RMSNorm: torch's, with the mark that sequence parallelism needs.

Under sequence parallelism each tensor-parallel rank normalises its part of the tokens, so the gradients of a
norm's weight are partial; Megatron sums those of parameters marked ``sequence_parallel``. Its own wrapper of
torch's norms refuses sequence parallelism for want of that mark.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from copd_megatron.policy.megatron.few_passes import rms_norm


class RMSNorm(nn.RMSNorm):
    """``torch.nn.RMSNorm`` as Megatron's layer specs build norms."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., hidden size], normed."""
        if x.dtype is not torch.float32 or self.weight.dtype is not torch.float32:
            return super().forward(x)
        assert self.eps is not None
        return rms_norm(x, self.weight, self.eps)
