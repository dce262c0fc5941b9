"""Is there room for what a run will write? Asked before anything is started. Imports no torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from copd_megatron.config import Config, ConfigError, ModelShape
from copd_megatron.planner.disk import _size, run_bytes

SHARED_MEMORY_BYTES_PER_RANK = 64 * 2**20
"""NCCL's and vLLM's segments in /dev/shm, roughly."""


def check_disk(config: Config, shapes: Mapping[str, ModelShape], folder: Path) -> None:
    """Whether the run directory's file system has room for the run.

    Raises:
        ConfigError: it has not.
    """
    place = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.exists() else 0
    needed = run_bytes(config, shapes) - there
    free = shutil.disk_usage(place).free
    if free < needed:
        options = config.checkpoint
        raise ConfigError(
            f"run.dir: {folder} needs up to {_size(needed)} more (checkpoints of all branches, "
            f"checkpoint.keep_last={options.keep_last} + keep_best={options.keep_best} + the one being "
            f"written, and the exports), {place} has {_size(free)} free; free some, name another "
            "run.dir, or keep fewer checkpoints"
        )


def check_shared_memory(num_ranks: int, folder: Path = Path("/dev/shm")) -> None:
    """Whether this machine has shared memory for ``num_ranks`` ranks.

    Raises:
        ConfigError: it has not; a container has 64 MiB by default.
    """
    needed = num_ranks * SHARED_MEMORY_BYTES_PER_RANK
    try:
        free = shutil.disk_usage(folder).free
    except FileNotFoundError:
        raise ConfigError(f"{folder} is not there: mount a tmpfs, NCCL and vLLM need it") from None
    if free < needed:
        raise ConfigError(
            f"{folder}: {free / 2**20:.0f} MiB free, {num_ranks} ranks on this machine need about "
            f"{needed / 2**20:.0f}; give the container more (docker run --shm-size=8g, or --ipc=host), or "
            f"remove what killed runs have left there"
        )


def local_ranks(total: int, environment: Mapping[str, str] | None = None) -> int:
    """Ranks of the job on this machine: torchrun says it; srun's tasks are taken to be spread evenly."""
    found = os.environ if environment is None else environment
    if "LOCAL_WORLD_SIZE" in found:
        return int(found["LOCAL_WORLD_SIZE"])
    nodes = int(found.get("SLURM_STEP_NUM_NODES", "1")) if "RANK" in found else 1
    return -(-total // nodes)
