"""This CPU's figures, in some seconds: matrix multiplication, memory, and processes that talk."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from copd_megatron.planner.machine import Machine, with_figures

_REPEATS = 5


def measured_cpu(machine: Machine) -> Machine:
    """``machine`` with what this CPU does on one core of one rank: multiplications and memory are measured,
    overheads are scaled by how much faster or slower the multiplications are."""
    tflops, memory_gb = _tflops(), _memory_gb()
    slower = machine.tflops / tflops
    overheads = {n: getattr(machine, n) * slower for n in _overheads(machine)}
    with Path("/proc/meminfo").open() as lines:
        total_kib = next(int(line.split()[1]) for line in lines if line.startswith("MemTotal"))
    cores = os.cpu_count() or 1
    return with_figures(
        machine,
        {
            **overheads,
            "tflops": tflops,
            "tflops_fp8": tflops,
            "memory_gb": memory_gb,
            "memory_gib": round(total_kib / 2**20 / cores, 2),
            "ranks_per_node": cores,
        },
    )


def _overheads(machine: Machine) -> list[str]:
    return [name for name in machine.__dataclass_fields__ if name.endswith("_seconds")]


def _tflops(size: int = 512) -> float:
    """Of one float32 matrix product on one thread."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one = torch.rand(size, size)
        seconds = _fastest(lambda: one @ one)
    finally:
        torch.set_num_threads(threads)
    return float(f"{2 * size**3 / seconds / 1e12:.3g}")


def _memory_gb(count: int = 2**24) -> float:
    """Gigabytes that one core reads and writes in a second, of more than its caches hold."""
    source = np.ones(count, dtype=np.float32)
    target = np.empty_like(source)
    seconds = _fastest(lambda: np.copyto(target, source))
    return float(f"{2 * source.nbytes / seconds / 1e9:.3g}")


def _fastest(work: Callable[[], object]) -> float:
    """The processor's seconds for the work, of the quickest of some repeats."""
    found = []
    for _ in range(_REPEATS):
        begin = time.thread_time()
        work()
        found.append(time.thread_time() - begin)
    return max(min(found), 1e-9)
