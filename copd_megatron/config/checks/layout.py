"""Parallel layouts: by themselves, against the model, and against the job."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from copd_megatron.config.bounds import divisors
from copd_megatron.config.schema import BranchConfig, Config, Device
from copd_megatron.model.shape import ModelShape


def problems(config: Config, shapes: Mapping[str, ModelShape]) -> Iterator[str]:
    """What is wrong with the branches' layouts, whose sizes are at least 1.

    Args:
        shapes: models by branch, as far as they are known.
    """
    for name, branch in config.branches.items():
        yield from _branch_layout(f"branches.{name}", branch)
        if name in shapes:
            yield from _branch_against_model(f"branches.{name}", branch, shapes[name], config.run.device)
    yield from _packing(config)


def world(config: Config, world_size: int | None) -> Iterator[str]:
    """Whether the job has as many ranks as the branches need; None: not known yet."""
    sizes = {name: branch.parallel.world_size for name, branch in config.branches.items()}
    total = sum(sizes.values())
    if world_size is not None and total != world_size:
        listed = " + ".join(f"{size} ({name})" for name, size in sizes.items())
        yield (
            f"branches.*.parallel: the branches need {listed} = {total} ranks, the job has {world_size}; "
            f"start it with {total} processes (torchrun --nproc-per-node={total} on one machine, or nodes x "
            f"processes per node = {total}), or change tensor_model_parallel_size, "
            f"pipeline_model_parallel_size or data_parallel_size"
        )


def _branch_layout(key: str, branch: BranchConfig) -> Iterator[str]:
    parallel, rollout = branch.parallel, branch.rollout
    ranks, rollout_tp = parallel.world_size, rollout.tensor_parallel_size
    if ranks % rollout_tp:
        yield (
            f"{key}.rollout.tensor_parallel_size: {rollout_tp} does not divide the branch's {ranks} ranks "
            f"({_rank_product(branch)}); use one of {divisors(ranks)}"
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
    per_stage = ranks // pipeline
    if per_stage % experts:
        yield (
            f"{key}.parallel.expert_model_parallel_size: {experts} does not divide the {per_stage} ranks of "
            f"a pipeline stage (tensor x context x data); use one of {divisors(per_stage)}"
        )


def _packing(config: Config) -> Iterator[str]:
    """Layouts that only packed micro-batches can have, and what shares prompts in them."""
    if config.training.share_prompts:
        for name, branch in config.branches.items():
            size = branch.parallel.context_parallel_size
            if size > 1:
                yield (
                    f"training.share_prompts: true does not go with branches.{name}.parallel."
                    f"context_parallel_size {size}, which splits every row; set it to null or false, or "
                    f"context_parallel_size=1"
                )
    if config.training.sequence_packing:
        return
    if config.training.share_prompts:
        yield (
            "training.share_prompts: true needs packed micro-batches; set training.sequence_packing=true, or "
            "share_prompts to null or false"
        )
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


def _branch_against_model(key: str, branch: BranchConfig, shape: ModelShape, device: Device) -> Iterator[str]:
    """Tensor and pipeline parallelism cut the model into equal pieces."""
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


def _rank_product(branch: BranchConfig) -> str:
    """The branch's ranks as a product, for messages."""
    parallel = branch.parallel
    return (
        f"tensor {parallel.tensor_model_parallel_size} x pipeline {parallel.pipeline_model_parallel_size} x "
        f"context {parallel.context_parallel_size} x data {parallel.data_parallel_size}"
    )
