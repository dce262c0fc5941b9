"""``copd train --dry-run``: describes a run without starting it. Imports neither torch nor vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from copd_megatron.config import Config, Device, ModelShape, read_model_shapes, to_yaml, validate
from copd_megatron.config.domains import describe_pools
from copd_megatron.config.graph import build_graph
from copd_megatron.planner.memory import GIB, compute_bytes, estimate_memory
from copd_megatron.topology.layout import Layout

_NVIDIA_DEVICE = Path("/dev/nvidiactl")
_PARTS = (
    "weights",
    "gradients",
    "optimizer",
    "activations",
    "logits",
    "extra_models",
    "weight_sync",
    "rollout",
)


def dry_run(config: Config, world_size: int | None = None) -> str:
    """The resolved config, the rank layout, the pools of mixed data, the distillation edges and the memory
    estimate, as text.

    Args:
        config: as ``load_config`` returns it.
        world_size: number of processes of the job, if known; a layout that does not fit it is refused.

    Raises:
        ConfigError: these settings cannot run. Data and verifiers are checked by ``preflight.check_inputs``.
    """
    shapes = read_model_shapes(config)
    validate(config, world_size, shapes)
    layout = Layout.from_config(config)
    sections = (
        ("Resolved configuration", to_yaml(config).rstrip()),
        ("Rank layout", f"{layout.world_size} ranks\n{layout.describe()}"),
        ("Prompt pools", describe_pools(config)),
        ("Distillation edges", build_graph(config).describe()),
        ("Memory per rank (estimate)", _describe_memory(config, shapes)),
    )
    return "\n\n".join(f"# {title}\n{body}" for title, body in sections if body) + "\n"


def _describe_memory(config: Config, shapes: Mapping[str, ModelShape]) -> str:
    on_gpu = config.run.device is Device.cuda or (
        config.run.device is Device.auto and _NVIDIA_DEVICE.exists()
    )
    dtype = "bfloat16" if compute_bytes(config, on_gpu=on_gpu) == 2 else "float32"
    lines = [f"{'CUDA' if on_gpu else 'CPU'}, {dtype}; formula: copd_megatron/planner/memory.py"]
    for name, branch in config.branches.items():
        shape = shapes[name]
        estimate = estimate_memory(config, branch, shape, on_gpu=on_gpu)
        parts = " + ".join(
            f"{part.replace('_', ' ')} {_size(getattr(estimate, part))}"
            for part in _PARTS
            if getattr(estimate, part)
        )
        lines.append(f"{name}: {shape.num_parameters:,} parameters; {_size(estimate.total)} per rank")
        if estimate.rollout_sleeps:
            lines.append(
                f"  the larger of two turns: {_size(estimate.training)} while the actor works (all but the "
                f"rollout part), {_size(estimate.sampling)} while vLLM does (that, and what the actor keeps)"
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
