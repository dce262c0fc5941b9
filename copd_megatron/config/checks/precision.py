"""Number formats, recomputation and overlap: among themselves, and against the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from copd_megatron.config.hardware import (
    CPU_ONLY,
    FP8_TOKEN_MULTIPLE,
    check_machine,
    check_quantization,
)
from copd_megatron.config.schema import Config, Device, FP8Recipe, Recompute
from copd_megatron.config.schema.training import RECOMPUTED_PARTS
from copd_megatron.errors import ConfigError
from copd_megatron.model.shape import ModelShape


def problems(config: Config, shapes: Mapping[str, ModelShape]) -> Iterator[str]:
    """What is wrong with the formats of weights, gradients and activations.

    Args:
        shapes: models by branch, as far as they are known.
    """
    yield from _settings(config)
    yield from _machine(config)
    yield from _against_model(config, shapes)


def _settings(config: Config) -> Iterator[str]:
    precision, optimizer, training = config.precision, config.optimizer, config.training
    edges = precision.num_bf16_layers_at_start, precision.num_bf16_layers_at_end
    if precision.fp8 is FP8Recipe.delayed and any(edges):
        yield (
            f"precision.fp8: delayed keeps one history of scales over all layers and cannot leave "
            f"{edges[0]} first and {edges[1]} last layers out; set num_bf16_layers_at_start and _at_end to "
            f"0, or use tensorwise or blockwise"
        )
    frozen = [name for name, branch in config.branches.items() if branch.frozen]
    if precision.fp8 is FP8Recipe.delayed and frozen:
        yield (
            f"precision.fp8: delayed learns its scales in updates, which the frozen branch {frozen[0]} never "
            f"makes: it would teach with scales of 1; use tensorwise or blockwise"
        )
    if precision.fp8_parameters and config.memory.offload_weights:
        yield (
            "memory.offload_weights: weights that are kept in FP8 (precision.fp8_parameters) cannot be "
            "parked in host memory; set one of the two to false"
        )
    if precision.fp8_parameters and precision.fp8 is FP8Recipe.none:
        yield "precision.fp8_parameters: true without precision.fp8; choose a recipe"
    for field in ("main_grads_dtype", "main_params_dtype", "moments_dtype"):
        value = getattr(optimizer, field)
        if value != "float32" and not optimizer.precision_aware:
            yield f"optimizer.{field}: {value} is used with optimizer.precision_aware=true only; set that"
    if training.overlap_param_gather and not training.overlap_grad_reduce:
        yield "training.overlap_param_gather: true needs training.overlap_grad_reduce=true; set both"


def _machine(config: Config) -> Iterator[str]:
    """What no rank could compute, whichever machine it is on; the ranks ask their own."""
    precision = config.precision
    if precision.fp8 is not FP8Recipe.none and config.model.dtype == "float32":
        yield (
            f"precision.fp8: {precision.fp8.value} with model.dtype float32: FP8 matrices stand beside "
            "bfloat16 ones; set model.dtype=bfloat16"
        )
    if config.run.device is not Device.cpu:
        return
    dtype = "bfloat16" if config.model.dtype == "bfloat16" else "float32"
    try:
        check_machine(precision, config.optimizer, CPU_ONLY, dtype=dtype)
    except ConfigError as error:
        yield f"{error} (run.device is cpu)"
    for name, branch in config.branches.items():
        try:
            check_quantization(branch.rollout.quantization, None)
        except ConfigError as error:
            if not branch.frozen:
                yield f"branches.{name}.{error} (run.device is cpu)"


def _against_model(config: Config, shapes: Mapping[str, ModelShape]) -> Iterator[str]:
    for name, shape in shapes.items():
        training = config.training
        if shape.vision is not None and training.overlap_grad_reduce and not config.model.freeze_vision:
            yield (
                f"training.overlap_grad_reduce: true with the trained vision tower of branch {name}: a "
                f"micro-batch without media leaves the tower out, and Megatron would wait for its gradients; "
                f"set it to false, or model.freeze_vision=true"
            )
        if (
            shape.vision is not None
            and training.recompute is Recompute.full
            and not training.sequence_packing
        ):
            yield (
                f"training.recompute: full with {shape.architecture} of branch {name} needs "
                f"training.sequence_packing=true: a layer that is computed again finds the vision tower's "
                f"deepstack features with the boundaries of its pack; set it, or use selective"
            )
        if training.recompute is Recompute.selective:
            yield from _recomputed_parts(config, name, shape)
        yield from _fp8_sizes(config, name, shape)
        edges = config.precision.num_bf16_layers_at_start + config.precision.num_bf16_layers_at_end
        if config.precision.fp8 is not FP8Recipe.none and edges >= shape.num_layers:
            yield (
                f"precision.num_bf16_layers_at_start + num_bf16_layers_at_end = {edges} leave no FP8 layer "
                f"of branch {name}'s {shape.num_layers}; lower them"
            )


def _recomputed_parts(config: Config, name: str, shape: ModelShape) -> Iterator[str]:
    """Parts that the model has, and that this machine can compute again."""
    absent = ("moe", "moe_act") if shape.num_experts is None else ("mlp",)
    for part in config.training.recompute_modules:
        if part in absent:
            others = [other for other in RECOMPUTED_PARTS.words if other not in absent]
            yield (
                f"training.recompute_modules: {part} is no part of branch {name}'s {shape.architecture}; use "
                f"some of {', '.join(others)}"
            )
        elif part == "moe_act" and config.precision.fp8 is FP8Recipe.delayed:
            yield (
                "training.recompute_modules: moe_act cannot be computed again under precision.fp8=delayed, "
                "whose scales it would count twice; use moe, or another recipe"
            )
        elif part == "moe_act" and config.run.device is Device.cpu:
            yield (
                "training.recompute_modules: moe_act is a part of the grouped product of experts that only a "
                "GPU has; use moe"
            )


def _fp8_sizes(config: Config, name: str, shape: ModelShape) -> Iterator[str]:
    """Every matrix that a rank multiplies in FP8 has sides that its recipe's blocks fill."""
    unit = FP8_TOKEN_MULTIPLE[config.precision.fp8]
    tensor = config.branches[name].parallel.tensor_model_parallel_size
    width = shape.ffn_hidden_size // tensor if shape.num_experts is None else shape.expert_ffn_size
    for what, size in (
        ("hidden size", shape.hidden_size),
        ("feed-forward width of a rank", width),
        ("query size of a rank", shape.num_attention_heads * shape.head_dim // tensor),
    ):
        if size % unit:
            yield (
                f"precision.fp8: {config.precision.fp8.value} multiplies blocks of {unit}, branch {name}'s "
                f"{what} is {size} (remainder {size % unit}); use a recipe of smaller blocks, or none"
            )
