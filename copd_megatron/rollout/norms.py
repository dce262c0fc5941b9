"""Root-mean-square norms of vLLM on a CPU by its compiled kernels.

vLLM has these kernels for CPUs too, but offers them to GPUs alone, and a CPU is left with one operation of
torch after another: for a small model a tenth of all sampling. Here the kernels are registered for a CPU as
well, in vLLM's own registry of implementations.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

_NAME = "copd_cpu"


@functools.cache
def compiled_norms() -> dict[str, list[str]]:
    """The ``ir_op_priority`` of an engine on a CPU. Registers what it names the first time."""
    from vllm import ir
    from vllm.platforms import current_platform

    current_platform.import_ir_kernels()
    kernels: Any = torch.ops._C

    def norm_fits(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
        """The kernel knows one data type, and neither a norm without a weight nor one of a part."""
        return weight is not None and weight.dtype == x.dtype and variance_size is None

    def sum_fits(
        x: Tensor,
        x_residual: Tensor,
        weight: Tensor | None,
        epsilon: float,
        variance_size: int | None = None,
    ) -> bool:
        return norm_fits(x, weight, epsilon, variance_size) and x_residual.dtype == x.dtype

    @ir.ops.rms_norm.register_impl(_NAME, supports_args=norm_fits)
    def rms_norm(
        x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
    ) -> Tensor:
        rows = x.contiguous()  # queries are views of the packed projection
        out = torch.empty_like(rows)
        kernels.rms_norm(out, rows, weight, epsilon)
        return out

    @ir.ops.fused_add_rms_norm.register_impl(_NAME, supports_args=sum_fits)
    def fused_add_rms_norm(
        x: Tensor,
        x_residual: Tensor,
        weight: Tensor | None,
        epsilon: float,
        variance_size: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        total = x + x_residual
        out = torch.empty_like(total)
        kernels.rms_norm(out, total, weight, epsilon)
        return out, total

    return {"rms_norm": [_NAME], "fused_add_rms_norm": [_NAME]}
