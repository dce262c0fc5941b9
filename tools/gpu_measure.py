"""How the parts of ``tools/gpu_check.py`` measure: time, memory, differences, kernels, multiplications."""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from copd_megatron.model.shape import ModelShape
from copd_megatron.records import FloatArray, IntArray, MediaRef

GIB = 2**30
PEAK_FLOPS = {"H200": 989.5e12, "H100": 989.5e12, "GH200": 989.5e12, "B200": 2250e12, "A100": 312e12}
"""Dense bfloat16, by a part of the device's name."""


class Figures:
    """What a part has found so far, in a file from the first figure on: a part that is cut short keeps it."""

    def __init__(self, path: Path | None = None) -> None:
        self.values: dict[str, Any] = {}
        self._path = path

    def add(self, **figures: Any) -> None:
        self.values |= figures
        if self._path is not None:
            partial = self._path.with_suffix(".partial")
            partial.write_text(json.dumps(self.values))
            partial.replace(self._path)


# ---- time, memory, differences ---------------------------------------------------------------------------


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def release() -> None:
    """What was let go of leaves the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def timed(action: Callable[[], Any], repeats: int = 1) -> float:
    """Median seconds."""
    seconds = []
    for _ in range(repeats):
        synchronize()
        begin = time.perf_counter()
        action()
        synchronize()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def difference(logprobs: Sequence[FloatArray], expected: Sequence[FloatArray]) -> dict[str, float | int]:
    """How far log-probabilities of the same tokens are from others: nats, and KL by its k3 estimate."""
    gaps = np.concatenate([one - other for one, other in zip(logprobs, expected, strict=True)])
    return {
        "max_logprob_error": float(np.abs(gaps).max()),
        "mean_logprob_error": float(np.abs(gaps).mean()),
        "kl_error": float((np.expm1(gaps) - gaps).mean()),
        "num_tokens": len(gaps),
    }


def profile_summary(action: Callable[[], Any], *, top: int = 15) -> dict[str, Any]:
    """Where one call's time goes: kernels (on CPU operators) by their own time, and how much of the call the
    device was busy. A profiler that does not work here is said in ``error``: it costs no other figure."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    on_cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    try:
        with profile(activities=activities) as recorded:
            wall = timed(action)
        rows = []
        for event in recorded.key_averages():
            if event.is_user_annotation or (on_cuda and event.device_type != DeviceType.CUDA):
                continue
            microseconds = event.self_device_time_total if on_cuda else event.self_cpu_time_total
            rows.append((float(microseconds), int(event.count), str(event.key)))
    except RuntimeError as error:
        return {"error": str(error)[:300]}
    rows.sort(reverse=True)
    total = sum(row[0] for row in rows)
    return {
        "wall_milliseconds": round(1e3 * wall, 2),
        "busy_milliseconds": round(total / 1e3, 2),
        "busy_share": round(total / 1e6 / wall, 3),
        "top": [
            {
                "name": name[:120],
                "calls": calls,
                "milliseconds": round(microseconds / 1e3, 3),
                "share": round(microseconds / max(total, 1e-9), 3),
            }
            for microseconds, calls, name in rows[:top]
        ],
    }


def device_memory() -> dict[str, float]:
    """GiB on the device now: ``device`` in use by all, and of torch's allocator in this process what is
    ``allocated`` and the ``slack`` that it holds beyond that. On CPU: ``resident``."""
    status = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line
    )
    resident = {"resident": int(status["VmRSS"].split()[0]) * 1024 / GIB}
    if not torch.cuda.is_available():
        return resident
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    allocated = torch.cuda.memory_allocated()
    return resident | {
        "device": (total - free) / GIB,
        "allocated": allocated / GIB,
        "slack": (torch.cuda.memory_reserved() - allocated) / GIB,
    }


def layers_that_fit(dims: ModelShape, *, tokens: int, fp8: bool = False, reserve_gib: float = 12.0) -> int:
    """Decoder layers of that shape that one GPU trains, at most the shape's own.

    A parameter takes 18 bytes (bfloat16 weight; float32 gradient, master weight and two moments), in FP8 two
    more. A token's activations take about 7 hidden states, projections before and after norm and rotary
    embedding, and three feed-forward widths, in bfloat16. ``tokens``: of one micro-batch. ``reserve_gib``:
    for logits, workspaces and what lies between blocks.
    """
    free, _ = torch.cuda.mem_get_info()
    query = dims.num_attention_heads * dims.head_dim
    key_value = dims.num_query_groups * dims.head_dim
    values = 7 * dims.hidden_size + 4 * query + 4 * key_value + 3 * dims.ffn_hidden_size
    layer = dims.layer_parameters * (20 if fp8 else 18) + 2 * values * tokens
    fixed = 18 * dims.embedding_parameters + reserve_gib * GIB
    if dims.vision is not None:
        tower = dims.vision
        fixed += 18 * tower.num_parameters + 40 * tower.hidden_size * tower.depth * tokens // 2
    return max(1, min(dims.num_layers, int((free - fixed) // layer)))


# ---- multiplications --------------------------------------------------------------------------------------


class Counted(Protocol):
    """What counts of a sequence."""

    @property
    def token_ids(self) -> IntArray: ...
    @property
    def prompt_length(self) -> int: ...
    @property
    def media(self) -> tuple[MediaRef, ...]: ...


def model_flops(dims: ModelShape, sequences: Sequence[Counted], *, patches: int = 0) -> float:
    """Multiplications and additions of one forward pass: matrices, causal attention, the output layer on
    response tokens, and for each image of ``patches`` the vision tower. A training step has three times as
    many, what is computed again not counted."""
    query = dims.num_attention_heads * dims.head_dim
    total = 0.0
    for sequence in sequences:
        length = len(sequence.token_ids)
        total += dims.num_layers * (2 * dims.active_layer_parameters * length + 2 * query * length**2)
        total += 2 * dims.embedding_parameters * (length - sequence.prompt_length)
        if dims.vision is not None and sequence.media:
            total += _tower_flops(dims, patches)
    return total


def _tower_flops(dims: ModelShape, patches: int) -> float:
    """Of one image: every block on every patch, attention between all of them, and the mergers, which take
    ``spatial_merge_size ** 2`` patches at a time."""
    tower = dims.vision
    assert tower is not None
    area = tower.spatial_merge_size**2
    merged = tower.hidden_size * area
    block = 4 * tower.hidden_size**2 + 2 * tower.hidden_size * tower.ffn_hidden_size
    embed = tower.in_channels * tower.temporal_patch_size * tower.patch_size**2 * tower.hidden_size
    mergers = (1 + tower.num_deepstack) * merged * (merged + tower.out_hidden_size)
    attention = 4 * tower.depth * tower.hidden_size * patches**2
    return 2 * patches * (tower.depth * block + embed + mergers / area) + attention


def peak_flops() -> float | None:
    """Of this GPU, in bfloat16; None where it is not known."""
    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)
