"""The ranks and the rollout engine of commands that sample from a model without training it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch.distributed as dist

from copd_megatron.config import Config
from copd_megatron.config.schema import RolloutConfig
from copd_megatron.data.loader import MediaLoader
from copd_megatron.errors import ConfigError
from copd_megatron.policy.device import model_dtype, uses_cuda
from copd_megatron.rollout.engine import RolloutEngine
from copd_megatron.topology.single import single_process
from copd_megatron.topology.world import init_world


@contextlib.contextmanager
def ranks_of_job(config: Config, name: str) -> Iterator[tuple[str, bool]]:
    """The job's ranks as one world, or a world of this process. Yields a run identifier, and whether this is
    the first rank."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        with single_process() as run_id:
            yield run_id, True
        return
    device: Literal["cuda", "cpu"] = "cuda" if uses_cuda(config) else "cpu"
    with init_world(
        {name: range(count)},
        device=device,
        timeout_seconds=config.run.collective_timeout_seconds,
        run_id=os.environ.get("COPD_RUN_ID", name),
    ) as world:
        yield name, world.is_first


def start_engine(
    config: Config,
    rollout: RolloutConfig,
    model_path: str | Path,
    *,
    name: str,
    run_id: str,
    media: MediaLoader | None,
) -> RolloutEngine:
    """Starts vLLM for the model whose config.json and tokenizer are in ``model_path``; it has no weights yet.
    Collective over all ranks. ``name`` is the engine's, in messages and in names of shared memory.

    Raises:
        ConfigError: the engine's tensor parallel size does not divide the ranks.
        RolloutError: vLLM could not start.
    """
    ranks, size = dist.get_world_size(), rollout.tensor_parallel_size
    if ranks % size:
        raise ConfigError(
            f"rollout.tensor_parallel_size: {size} does not divide the {ranks} ranks of this command; start "
            f"it with torchrun --nproc-per-node {size}, or set branches.NAME.rollout.tensor_parallel_size=1"
        )
    return RolloutEngine(
        model_path=model_path,
        config=rollout,
        branch=name,
        run_id=run_id,
        dtype=model_dtype(config),
        max_tokens=config.model.max_sequence_tokens,
        seed=config.run.seed,
        media=media,
    )
