"""``copd train --dry-run``: describes a run without starting it. Imports neither torch nor vLLM."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from copd_megatron.checkpoint.compatible import differences
from copd_megatron.config import (
    BranchConfig,
    Config,
    Device,
    ModelShape,
    read_model_shapes,
    to_yaml,
    validate,
)
from copd_megatron.config.domains import describe_pools, domains_of
from copd_megatron.config.graph import build_graph
from copd_megatron.planner.memory import GIB, compute_bytes, estimate_memory
from copd_megatron.topology.layout import Layout

NO_CHECKPOINTS = "no checkpoint is saved before the end, so a crash loses the run"
_NVIDIA_DEVICE = Path("/dev/nvidiactl")
_PARTS = (
    "weights",
    "gradients",
    "optimizer",
    "activations",
    "logits",
    "extra_models",
    "media",
    "weight_sync",
    "engine_weights",
    "kv_cache",
)


def dry_run(
    config: Config, world_size: int | None = None, num_samples: Mapping[str, int] | None = None
) -> str:
    """The resolved config and what differs from the defaults, the schedule, the rank layout, the pools of
    mixed data, the distillation edges and the memory estimate, as text.

    Args:
        config: as ``load_config`` returns it.
        num_samples: training samples by domain (``preflight.check_inputs``), to count epochs.
        world_size: number of processes of the job, if known; a layout that does not fit it is refused.

    Raises:
        ConfigError: these settings cannot run. Data and verifiers are checked by ``preflight.check_inputs``.
    """
    shapes = read_model_shapes(config)
    validate(config, world_size, shapes)
    layout = Layout.from_config(config)
    sections = (
        ("Resolved configuration", to_yaml(config).rstrip()),
        ("Settings that differ from their defaults", "\n".join(_changed(config))),
        ("Schedule", "\n".join(_describe_schedule(config, num_samples or {}))),
        ("Rank layout", f"{layout.world_size} ranks\n{layout.describe()}"),
        ("Prompt pools", describe_pools(config)),
        ("Distillation edges", build_graph(config).describe()),
        ("Memory per rank (estimate)", _describe_memory(config, shapes)),
    )
    return "\n\n".join(f"# {title}\n{body}" for title, body in sections if body) + "\n"


def _changed(config: Config) -> Iterator[str]:
    defaults = Config(branches={name: BranchConfig() for name in config.branches})
    for key, (default, value) in differences(to_yaml(defaults), config).items():
        yield f"{key}: {value}" + ("" if default in ("???", [], None) else f"  (default {default})")


def _describe_schedule(config: Config, num_samples: Mapping[str, int]) -> Iterator[str]:
    """Steps, what each branch samples in them, and how often that goes through its data."""
    schedule = config.schedule
    steps = schedule.cycles * (schedule.rlvr_steps + schedule.opd_steps)
    yield (
        f"{steps} steps: {schedule.cycles} cycles of {schedule.rlvr_steps} steps of Phase I and "
        f"{schedule.opd_steps} of Phase II"
    )
    for name, branch in config.branches.items():
        if branch.frozen or not config.native.weight:
            continue
        prompts, samples = branch.num_prompts_per_step, branch.num_generations_per_prompt
        own = sum(num_samples.get(domain.name, 0) for domain in domains_of(config, name))
        epochs = f"; {own} training samples, {steps * prompts / own:.3g} epochs" if own else ""
        yield (
            f"{name}: {prompts} prompts x {samples} responses per step of its own, at most "
            f"{prompts * samples * branch.rollout.max_new_tokens:,} response tokens{epochs}"
        )
    if not config.checkpoint.save_period:
        yield f"{NO_CHECKPOINTS} (checkpoint.save_period=0)"


def _gpu_bytes() -> int | None:
    """Memory of this machine's smallest GPU; None where there is none, or its driver does not say."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        return min(int(line) for line in listed.split()) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def _describe_memory(config: Config, shapes: Mapping[str, ModelShape]) -> str:
    on_gpu = config.run.device is Device.cuda or (
        config.run.device is Device.auto and _NVIDIA_DEVICE.exists()
    )
    dtype = "bfloat16" if compute_bytes(config, on_gpu=on_gpu) == 2 else "float32"
    lines = [f"{'CUDA' if on_gpu else 'CPU'}, {dtype}; formula: copd_megatron/planner/memory.py"]
    gpu = _gpu_bytes() if on_gpu else None
    for name, branch in config.branches.items():
        shape = shapes[name]
        estimate = estimate_memory(config, branch, shape, on_gpu=on_gpu)
        parts = " + ".join(
            f"{part.replace('_', ' ')} {_size(getattr(estimate, part))}"
            for part in _PARTS
            if getattr(estimate, part)
        )
        lines.append(f"{name}: {shape.num_parameters:,} parameters; {_size(estimate.total)} per rank")
        if gpu is not None:
            verdict = "fits" if estimate.total <= gpu else "DOES NOT FIT: use more ranks, or see memory.*"
            lines.append(f"  {verdict} (this machine's GPUs have {_size(gpu)})")
        if estimate.rollout_sleeps:
            lines.append(
                f"  the larger of two turns: {_size(estimate.training)} while the actor works (all but "
                f"vLLM's parts), {_size(estimate.sampling)} while vLLM does (that, and what the actor keeps)"
            )
        lines.append(f"  parts: {parts}")
        if on_gpu and not branch.frozen:
            share = branch.rollout.gpu_memory_utilization
            lines.append(f"  of which vLLM's share grows to {share:.0%} of the GPU with its KV cache")
    return "\n".join(lines)


def _size(num_bytes: int) -> str:
    if num_bytes >= GIB:
        return f"{num_bytes / GIB:.2f} GiB"
    return f"{num_bytes / 1024**2:.1f} MiB"
