"""How much memory each phase of a step needs, as metrics.

On a GPU: the peak of torch's allocator within the phase (``peak``), what is in use on the device at its end,
by vLLM and CUDA too (``device``), and what the allocator holds beyond what is allocated (``slack``: growth
from cycle to cycle is fragmentation). On CPU: the process's resident memory at the phase's end.
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
    """Measures the block; the largest of a step's blocks of one name, and of all ranks, counts."""
    on_cuda = torch.cuda.is_available()
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    yield
    for name, size in (_device_memory() if on_cuda else _host_memory()).items():
        metrics.maximum(f"perf/memory_{phase}_{name}_gib", size / GIB)


def _device_memory() -> dict[str, int]:
    free, total = torch.cuda.mem_get_info()
    return {
        "peak": torch.cuda.max_memory_allocated(),
        "device": total - free,
        "slack": torch.cuda.memory_reserved() - torch.cuda.memory_allocated(),
    }


def _host_memory() -> dict[str, int]:
    """From the kernel, in kilobytes: ``VmRSS:  1234 kB``."""
    status = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line
    )
    return {"resident": int(status["VmRSS"].split()[0]) * 1024}
