"""Our configuration in Megatron's words: fields of its transformer, optimizer and data-parallel configs.

Pure but for torch's names of types; tests build Megatron's own classes from every combination.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import Any

import torch

from copd_megatron.config.hardware import Machine
from copd_megatron.config.schema import (
    FP8Recipe,
    OptimizerConfig,
    PrecisionConfig,
    Recompute,
    TrainingConfig,
)

_AMAX_HISTORY_STEPS = 1024
"""Steps whose largest values the delayed recipe remembers (Transformer Engine's default)."""


def this_machine() -> Machine:
    """What this rank has."""
    on_gpu = torch.cuda.is_available()
    engine = None
    if importlib.util.find_spec("transformer_engine_torch") is not None:
        engine = importlib.metadata.version("transformer-engine")
    return Machine(
        capability=torch.cuda.get_device_capability() if on_gpu else None,
        transformer_engine=engine,
        cuda=torch.version.cuda,
    )


def fused_weight_gradient() -> bool:
    """Whether Apex's kernel that adds a weight's gradient straight into the float32 buffer is here; without
    it Megatron's own linear layers refuse ``gradient_accumulation_fusion``."""
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def precision_fields(precision: PrecisionConfig) -> dict[str, Any]:
    """Of ``TransformerConfig``."""
    if precision.fp8 is FP8Recipe.none:
        return {}
    edges = precision.num_bf16_layers_at_start, precision.num_bf16_layers_at_end
    fields: dict[str, Any] = {
        "fp8": precision.fp8_format.value,
        "fp8_recipe": precision.fp8.value,
        "fp8_param": precision.fp8_parameters,
        "first_last_layers_bf16": any(edges),
        "num_layers_at_start_in_bf16": edges[0],
        "num_layers_at_end_in_bf16": edges[1],
    }
    if precision.fp8 is FP8Recipe.delayed:
        fields |= {"fp8_amax_history_len": _AMAX_HISTORY_STEPS, "fp8_amax_compute_algo": "max"}
    return fields


def recompute_fields(training: TrainingConfig) -> dict[str, Any]:
    """Of ``TransformerConfig``."""
    if training.recompute is Recompute.none:
        return {}
    if training.recompute is Recompute.selective:
        return {"recompute_granularity": "selective", "recompute_modules": list(training.recompute_modules)}
    return {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": training.recompute_num_layers,
    }


def data_parallel_fields(
    training: TrainingConfig, precision: PrecisionConfig, optimizer: OptimizerConfig
) -> dict[str, Any]:
    """Of ``DistributedDataParallelConfig``."""
    return {
        "grad_reduce_in_fp32": optimizer.main_grads_dtype == "float32",
        "use_distributed_optimizer": True,
        "overlap_grad_reduce": training.overlap_grad_reduce,
        "overlap_param_gather": training.overlap_param_gather,
        "fp8_param_gather": precision.fp8_parameters,
        "check_for_nan_in_grad": False,
    }


def optimizer_fields(
    optimizer: OptimizerConfig, training: TrainingConfig, precision: PrecisionConfig, dtype: torch.dtype
) -> dict[str, Any]:
    """Of Megatron's ``OptimizerConfig``: AdamW; float32 master weights beside a bfloat16 model."""
    fields: dict[str, Any] = {
        "optimizer": "adam",
        "lr": optimizer.lr,
        "min_lr": optimizer.min_lr,
        "weight_decay": optimizer.weight_decay,
        "adam_beta1": optimizer.adam_beta1,
        "adam_beta2": optimizer.adam_beta2,
        "adam_eps": optimizer.adam_eps,
        "clip_grad": optimizer.clip_grad,
        "bf16": dtype is torch.bfloat16,
        "params_dtype": dtype,
        "use_distributed_optimizer": True,
        "overlap_param_gather": training.overlap_param_gather,
    }
    if precision.fp8 is not FP8Recipe.none:
        fields["fp8_recipe"] = precision.fp8.value
    if optimizer.precision_aware:
        moments = getattr(torch, optimizer.moments_dtype)
        fields |= {
            "use_precision_aware_optimizer": True,
            "main_grads_dtype": getattr(torch, optimizer.main_grads_dtype),
            "main_params_dtype": getattr(torch, optimizer.main_params_dtype),
            "exp_avg_dtype": moments,
            "exp_avg_sq_dtype": moments,
        }
    if optimizer.cpu_offload_fraction > 0:
        fields |= {
            "optimizer_cpu_offload": True,
            "optimizer_offload_fraction": optimizer.cpu_offload_fraction,
            "overlap_cpu_optimizer_d2h_h2d": True,
        }
    return fields
