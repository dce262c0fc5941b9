"""One function under many Megatron layouts, in one launch of four ranks.

The layouts share the same processes. Each gets its own process group, on as many neighbouring ranks as it
needs, and Megatron's state is torn down after it. Layouts of one and two ranks run side by side.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from copd_megatron.config.schema import ParallelConfig
from tests.support.distributed import run_distributed

NUM_RANKS = 4

# Further fields of a job's ParallelConfig.
SEQUENCE = {"sequence_parallel": True}
VIRTUAL = {"virtual_pipeline_model_parallel_size": 2}
EXPERTS = {"expert_model_parallel_size": 2}


@dataclass(frozen=True, kw_only=True)
class Job:
    """``fn(layout, *args)`` on ``tp * pp * cp * dp`` ranks."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    cp: int = 1
    args: tuple[Any, ...] = ()
    also: dict[str, Any] = field(default_factory=dict)
    """Further fields of ParallelConfig."""

    @property
    def layout(self) -> tuple[int, int, int]:
        return self.tp, self.pp, self.dp

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def parallel(self) -> ParallelConfig:
        return ParallelConfig(
            tensor_model_parallel_size=self.tp,
            pipeline_model_parallel_size=self.pp,
            context_parallel_size=self.cp,
            data_parallel_size=self.dp,
            **self.also,
        )


def run_layouts(fn: Callable[..., Any], jobs: Sequence[Job], *, timeout: float = 400) -> list[list[Any]]:
    """Results of every job, by job and then by rank within it."""
    starts = _place(jobs)
    per_rank = run_distributed(
        _run_jobs, NUM_RANKS, args=(fn, list(jobs), starts), timeout=timeout, megatron=True
    )
    return [
        [per_rank[start + rank][number] for rank in range(job.world_size)]
        for number, (job, start) in enumerate(zip(jobs, starts, strict=True))
    ]


def _place(jobs: Sequence[Job]) -> list[int]:
    """First rank of each job: where the least work is queued, aligned to the job's size."""
    load = [0.0] * NUM_RANKS
    starts = []
    for job in jobs:
        places = range(0, NUM_RANKS - job.world_size + 1, job.world_size)
        start = min(places, key=lambda place: max(load[place : place + job.world_size]))
        end = max(load[start : start + job.world_size]) + 1
        load[start : start + job.world_size] = [end] * job.world_size
        starts.append(start)
    return starts


def _run_jobs(fn: Callable[..., Any], jobs: Sequence[Job], starts: Sequence[int]) -> dict[int, Any]:
    import torch.distributed as dist
    from megatron.core import parallel_state

    me = int(os.environ["RANK"])
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), None, False)
    results = {}
    for number, (job, start) in enumerate(zip(jobs, starts, strict=True)):
        if not start <= me < start + job.world_size:
            continue
        dist.init_process_group(
            "gloo", store=dist.PrefixStore(f"job/{number}", store), rank=me - start, world_size=job.world_size
        )
        try:
            results[number] = fn(job.parallel, *job.args)
        finally:
            if parallel_state.model_parallel_is_initialized():
                parallel_state.destroy_model_parallel()
        dist.barrier()
        dist.destroy_process_group()
    return results
