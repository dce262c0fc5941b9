"""Checks of parallel layouts and number formats: by themselves, and against the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from copd_megatron.config.bounds import divisors
from copd_megatron.config.hardware import FP8_TOKEN_MULTIPLE
from copd_megatron.config.schema import BranchConfig, Config, Device, FP8Recipe, Recompute
from copd_megatron.model.shape import ModelShape


def branch_layout(key: str, branch: BranchConfig) -> Iterator[str]:
    parallel, rollout = branch.parallel, branch.rollout
    ranks, rollout_tp = parallel.world_size, rollout.tensor_parallel_size
    if ranks > 0 and rollout_tp > 0 and ranks % rollout_tp:
        yield (
            f"{key}.rollout.tensor_parallel_size: {rollout_tp} does not divide the branch's {ranks} ranks "
            f"({rank_product(branch)}); use one of {divisors(ranks)}"
        )
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        yield (
            f"{key}.parallel.sequence_parallel: true splits tokens over tensor-parallel ranks, but "
            f"tensor_model_parallel_size is 1; use false, or context_parallel_size for long sequences"
        )
    virtual, pipeline = parallel.virtual_pipeline_model_parallel_size, parallel.pipeline_model_parallel_size
    if virtual > 1 and pipeline == 1:
        yield (
            f"{key}.parallel.virtual_pipeline_model_parallel_size: {virtual} interleaves pipeline stages, "
            f"but pipeline_model_parallel_size is 1; use 1"
        )
    experts = parallel.expert_model_parallel_size
    per_stage = ranks // pipeline if pipeline > 0 else 0
    if experts > 0 and per_stage % experts:
        yield (
            f"{key}.parallel.expert_model_parallel_size: {experts} does not divide the {per_stage} ranks of "
            f"a pipeline stage (tensor x context x data); use one of {divisors(per_stage)}"
        )


def packing(config: Config) -> Iterator[str]:
    """Layouts that only packed micro-batches can have."""
    if config.training.sequence_packing:
        return
    for name, branch in config.branches.items():
        for field in (
            "context_parallel_size",
            "expert_model_parallel_size",
            "virtual_pipeline_model_parallel_size",
        ):
            size = getattr(branch.parallel, field)
            if size > 1:
                yield (
                    f"training.sequence_packing: false does not go with branches.{name}.parallel.{field} "
                    f"{size}, which only packed micro-batches can have; set it to true, or {field}=1"
                )


def branch_against_model(name: str, branch: BranchConfig, shape: ModelShape, device: Device) -> Iterator[str]:
    """Tensor and pipeline parallelism cut the model into equal pieces."""
    key = f"branches.{name}"
    tensor = branch.parallel.tensor_model_parallel_size
    pipeline = branch.parallel.pipeline_model_parallel_size
    for what, size in (
        ("attention heads", shape.num_attention_heads),
        ("query groups (key/value heads)", shape.num_query_groups),
        *([("feed-forward width", shape.ffn_hidden_size)] if shape.num_experts is None else []),
    ):
        if size % tensor:
            yield (
                f"{key}.parallel.tensor_model_parallel_size: {tensor} does not divide the model's {what}, "
                f"{size} (remainder {size % tensor}); use one of {divisors(size)}"
            )
    if shape.num_layers % pipeline:
        yield (
            f"{key}.parallel.pipeline_model_parallel_size: {pipeline} does not divide the model's "
            f"{shape.num_layers} layers (remainder {shape.num_layers % pipeline}); "
            f"use one of {divisors(shape.num_layers)}"
        )
    yield from _experts_against_model(key, branch, shape, device)
    virtual = branch.parallel.virtual_pipeline_model_parallel_size
    pieces = pipeline * virtual
    if virtual > 1 and shape.num_layers % pieces:
        yield (
            f"{key}.parallel.virtual_pipeline_model_parallel_size: {pipeline} stages x {virtual} chunks do "
            f"not divide the model's {shape.num_layers} layers (remainder {shape.num_layers % pieces})"
        )
    elif virtual > 1 and shape.vision is not None and shape.num_layers // pieces < shape.vision.num_deepstack:
        yield (
            f"{key}.parallel.virtual_pipeline_model_parallel_size: {virtual} leaves {shape.num_layers} / "
            f"{pieces} = {shape.num_layers // pieces} layers in the first chunk, but the vision tower feeds "
            f"its deepstack features into the first {shape.vision.num_deepstack}; use fewer chunks"
        )
    if shape.vision is not None and shape.num_layers // pipeline < shape.vision.num_deepstack:
        wanted, layers = shape.vision.num_deepstack, shape.num_layers
        yield (
            f"{key}.parallel.pipeline_model_parallel_size: {pipeline} leaves {layers} / {pipeline} = "
            f"{layers // pipeline} layers on the first stage, but the vision tower feeds its deepstack "
            f"features into the first {wanted}; use at most {layers // wanted}"
        )
    rollout_tp = branch.rollout.tensor_parallel_size
    heads, groups = shape.num_attention_heads, shape.num_query_groups
    if heads % rollout_tp or (groups % rollout_tp and rollout_tp % groups):
        yield (
            f"{key}.rollout.tensor_parallel_size: {rollout_tp} has to divide the model's {heads} attention "
            f"heads and to divide or be a multiple of its {groups} key/value heads; use one of "
            f"{[d for d in divisors(heads) if groups % d == 0 or d % groups == 0]}"
        )


_CPU_EXPERT_BLOCK = 32
"""vLLM pads narrower shares when it starts, which fresh weights would then not fit."""


def _experts_against_model(
    key: str, branch: BranchConfig, shape: ModelShape, device: Device
) -> Iterator[str]:
    experts, tensor = branch.parallel.expert_model_parallel_size, branch.parallel.tensor_model_parallel_size
    if shape.num_experts is None:
        if experts > 1:
            yield (
                f"{key}.parallel.expert_model_parallel_size: {experts}, but {shape.architecture} is dense "
                f"and has no experts to spread; use 1"
            )
        return
    width, rollout_tp = shape.expert_ffn_size, branch.rollout.tensor_parallel_size
    if width % rollout_tp:
        yield (
            f"{key}.rollout.tensor_parallel_size: {rollout_tp} does not divide the {width} feed-forward rows "
            f"of an expert (remainder {width % rollout_tp}); use one of {divisors(width)}"
        )
    elif device is Device.cpu and not branch.frozen:
        for what, size in (("hidden size", shape.hidden_size), ("share of an expert", width // rollout_tp)):
            if size % _CPU_EXPERT_BLOCK:
                yield (
                    f"{key}.rollout.tensor_parallel_size: {rollout_tp}: on a CPU, vLLM multiplies experts in "
                    f"blocks of {_CPU_EXPERT_BLOCK}, a rank's {what} is {size} (remainder "
                    f"{size % _CPU_EXPERT_BLOCK}); use a smaller one, or a model with wider experts"
                )
    if shape.num_experts % experts:
        yield (
            f"{key}.parallel.expert_model_parallel_size: {experts} does not divide the model's "
            f"{shape.num_experts} experts; use one of {divisors(shape.num_experts)}"
        )
    if tensor > 1 and not branch.parallel.sequence_parallel:
        yield (
            f"{key}.parallel.sequence_parallel: false with tensor_model_parallel_size {tensor} would send "
            f"every token to its experts {tensor} times; set it to true"
        )


_OPTIMIZER_DTYPES = {
    "main_grads_dtype": ("float32", "bfloat16"),
    "main_params_dtype": ("float32", "float16"),
    "moments_dtype": ("float32", "bfloat16", "float16", "uint8"),
}


def precision_settings(config: Config) -> Iterator[str]:
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
    for field, allowed in _OPTIMIZER_DTYPES.items():
        value = getattr(optimizer, field)
        if value not in allowed:
            yield f"optimizer.{field}: {value!r} must be one of {', '.join(allowed)}"
        elif value != "float32" and not optimizer.precision_aware:
            yield f"optimizer.{field}: {value} is used with optimizer.precision_aware=true only; set that"
    for part in training.recompute_modules:
        if part not in _RECOMPUTED_PARTS:
            yield f"training.recompute_modules: {part!r} is none of {', '.join(_RECOMPUTED_PARTS)}"
    if training.overlap_param_gather and not training.overlap_grad_reduce:
        yield "training.overlap_param_gather: true needs training.overlap_grad_reduce=true; set both"


def precision_against_model(config: Config, shapes: Mapping[str, ModelShape]) -> Iterator[str]:
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


_RECOMPUTED_PARTS = ("core_attn", "mlp", "moe", "moe_act")


def _recomputed_parts(config: Config, name: str, shape: ModelShape) -> Iterator[str]:
    """Parts that the model has, and that this machine can compute again."""
    absent = ("moe", "moe_act") if shape.num_experts is None else ("mlp",)
    for part in config.training.recompute_modules:
        if part in absent:
            others = [other for other in _RECOMPUTED_PARTS if other not in absent]
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


def rank_product(branch: BranchConfig) -> str:
    parallel = branch.parallel
    return (
        f"tensor {parallel.tensor_model_parallel_size} x pipeline {parallel.pipeline_model_parallel_size} x "
        f"context {parallel.context_parallel_size} x data {parallel.data_parallel_size}"
    )
