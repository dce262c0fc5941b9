"""What a machine's GPUs and libraries can compute with, as pure functions of their versions.

The actor refuses a recipe that its machine lacks; ``copd doctor`` shows the same answers beforehand.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from copd_megatron.config.schema import (
    FP8Recipe,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    RolloutQuantization,
    TrainingConfig,
)
from copd_megatron.errors import ConfigError

Capability = tuple[int, int]
"""Compute capability, (9, 0) for sm90."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What one rank finds."""

    capability: Capability | None
    """None: no GPU."""
    transformer_engine: str | None
    """Version; None: not installed, or without its PyTorch extension."""
    cuda: str | None
    """Version that torch was built with."""


CPU_ONLY = Machine(capability=None, transformer_engine=None, cuda=None)
"""What ``run.device=cpu`` leaves of any machine."""


@dataclass(frozen=True, kw_only=True)
class Requirement:
    """What Transformer Engine asks for before it runs a recipe."""

    lowest: Capability
    below: Capability
    """First capability that lacks it again."""
    named: str
    transformer_engine: str
    cuda: str


REQUIREMENTS: dict[FP8Recipe, Requirement] = {
    FP8Recipe.delayed: Requirement(
        lowest=(8, 9), below=(99, 0), named="sm89 or newer", transformer_engine="2.1", cuda="12.1"
    ),
    FP8Recipe.tensorwise: Requirement(
        lowest=(8, 9), below=(99, 0), named="sm89 or newer", transformer_engine="2.2", cuda="12.1"
    ),
    FP8Recipe.blockwise: Requirement(
        lowest=(9, 0), below=(10, 0), named="sm90 (Hopper)", transformer_engine="2.3", cuda="12.9"
    ),
    FP8Recipe.mxfp8: Requirement(
        lowest=(10, 0), below=(12, 0), named="sm100 (Blackwell)", transformer_engine="2.1", cuda="12.8"
    ),
}

FP8_TOKEN_MULTIPLE: dict[FP8Recipe, int] = {
    FP8Recipe.none: 1,
    FP8Recipe.delayed: 16,
    FP8Recipe.tensorwise: 16,
    FP8Recipe.blockwise: 128,
    FP8Recipe.mxfp8: 32,
}
"""Rows and columns of a matrix must come to a multiple of this: a recipe's scaling block, or what the FP8
matrix multiplication wants."""


def missing_for(recipe: FP8Recipe, machine: Machine) -> str | None:
    """What the machine lacks for a recipe, in words; None: nothing."""
    if recipe is FP8Recipe.none:
        return None
    needs = REQUIREMENTS[recipe]
    if machine.capability is None:
        return f"no GPU; it needs {needs.named}"
    if not needs.lowest <= machine.capability < needs.below:
        major, minor = machine.capability
        return f"this GPU is sm{major}{minor}; it needs {needs.named}"
    for what, found, wanted in (
        ("Transformer Engine", machine.transformer_engine, needs.transformer_engine),
        ("CUDA", machine.cuda, needs.cuda),
    ):
        if found is None:
            return f"no {what}; it needs {wanted} or newer"
        if _number(found) < _number(wanted):
            return f"{what} {found}; it needs {wanted} or newer"
    return None


def supported_recipes(machine: Machine) -> list[FP8Recipe]:
    """The FP8 recipes that a machine runs."""
    return [recipe for recipe in REQUIREMENTS if missing_for(recipe, machine) is None]


def check_machine(
    precision: PrecisionConfig, optimizer: OptimizerConfig | None, machine: Machine, *, dtype: str
) -> None:
    """Refuses settings that this machine cannot run.

    Args:
        dtype: the actor's compute type, ``bfloat16`` or ``float32``.

    Raises:
        ConfigError: with the setting, the reason and what would do instead.
    """
    recipe = precision.fp8
    if reason := missing_for(recipe, machine):
        others = ", ".join(r.value for r in supported_recipes(machine)) or "none"
        raise ConfigError(f"precision.fp8: {recipe.value}: {reason}. Recipes for this machine: {others}")
    if recipe is not FP8Recipe.none and dtype != "bfloat16":
        raise ConfigError(
            f"precision.fp8: {recipe.value} with model.dtype {dtype}: FP8 matrices stand beside bfloat16 "
            "ones; set model.dtype=bfloat16"
        )
    if optimizer is None:
        return
    if optimizer.cpu_offload_fraction > 0 and machine.capability is None:
        raise ConfigError(
            f"optimizer.cpu_offload_fraction: {optimizer.cpu_offload_fraction:g}, but there is no GPU whose "
            "memory it would spare; set it to 0"
        )
    if optimizer.precision_aware and machine.transformer_engine is None:
        raise ConfigError(
            "optimizer.precision_aware: it is Transformer Engine's Adam that keeps states in other types, "
            "and that is not installed; set it to false"
        )


def shares_prompts(training: TrainingConfig, parallel: ParallelConfig, *, on_gpu: bool) -> bool:
    """Whether a prompt is computed once for its responses in a micro-batch (``training.share_prompts``)."""
    if training.share_prompts is not None:
        return training.share_prompts
    return not on_gpu and training.sequence_packing and parallel.context_parallel_size == 1


def check_quantization(quantization: RolloutQuantization, capability: Capability | None) -> None:
    """Refuses a quantisation of rollouts that this machine's GPU cannot multiply.

    Raises:
        ConfigError: with the reason.
    """
    if quantization is RolloutQuantization.none:
        return
    if capability is None:
        raise ConfigError("rollout.quantization: fp8 needs a GPU (sm89 or newer); use none")
    if capability < (8, 9):
        raise ConfigError(
            f"rollout.quantization: fp8 needs sm89 or newer, this GPU is sm{capability[0]}{capability[1]}; "
            "use none"
        )


def _number(version: str) -> tuple[int, ...]:
    """Leading numbers of a version: ``2.20.2+cu130`` is (2, 20, 2)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else (0,)
