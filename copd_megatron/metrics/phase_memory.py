"""Memory used in each phase of a step, as metrics.

On a GPU: the peak of torch's allocator during the phase (``peak``); device memory in use at its end,
including that of vLLM and CUDA (``device``); and memory that the allocator has reserved but not allocated
(``slack``, which grows from cycle to cycle if memory fragments). On a CPU: the process's resident memory at
the end of the phase (``resident``) and its peak during the phase (``peak``), where the kernel can reset it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from copd_megatron.metrics.reduction import Metrics

GIB = 2**30


@contextlib.contextmanager
def phase_memory(metrics: Metrics, phase: str) -> Iterator[None]:
    """Measures the block. Reports the largest value over the blocks of this name in a step and over all
    ranks."""
    on_cuda = torch.cuda.is_available()
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    knows_peak = on_cuda or _reset_host_peak()
    yield
    for name, size in (_device_memory() if on_cuda else _host_memory(knows_peak)).items():
        metrics.maximum(f"perf/memory_{phase}_{name}_gib", size / GIB)


def _device_memory() -> dict[str, int]:
    free, total = torch.cuda.mem_get_info()
    return {
        "peak": torch.cuda.max_memory_allocated(),
        "device": total - free,
        "slack": torch.cuda.memory_reserved() - torch.cuda.memory_allocated(),
    }


def _reset_host_peak() -> bool:
    """Makes the kernel's peak of this process's resident memory start from now; whether it could."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not every container may
        return False
    return True


def _host_memory(knows_peak: bool) -> dict[str, int]:
    """Read from the kernel, which reports kilobytes: ``VmRSS:  1234 kB``."""
    status = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line
    )
    names = {"resident": "VmRSS", "peak": "VmHWM"} if knows_peak else {"resident": "VmRSS"}
    return {name: int(status[field].split()[0]) * 1024 for name, field in names.items()}
