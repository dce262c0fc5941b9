"""Whether the settings can run on what this machine has, as far as it shows without importing torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from copd_megatron.config import Config, Device, read_model_shapes, validate
from copd_megatron.errors import ConfigError

GPU_DEVICES: Final = tuple(map(Path, ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")))
"""Of drivers: one of them is there where torch could see a GPU."""


def check_device(config: Config, devices: Sequence[Path] = GPU_DEVICES) -> None:
    """Refuses GPUs where there are none; what ``run.device=auto`` would make of that is checked as if it had
    been said.

    Raises:
        ConfigError: with the setting and the remedy.
    """
    if config.run.device is Device.cpu or any(device.exists() for device in devices):
        return
    if config.run.device is Device.cuda:
        raise ConfigError(
            "run.device: cuda, but this machine shows no GPU (none of "
            f"{', '.join(map(str, devices))}); copd doctor shows what is here. Set run.device=cpu or auto"
        )
    on_cpu = replace(config, run=replace(config.run, device=Device.cpu))
    validate(on_cpu, None, read_model_shapes(config))


def check_memory(config: Config, *, alone: bool, devices: Sequence[Path] = GPU_DEVICES) -> None:
    """Refuses KV caches that this machine's memory cannot hold, where they are in it: on a CPU.

    Args:
        alone: all ranks are on this machine, not only some of them.

    Raises:
        ConfigError: with the setting and the remedy.
    """
    on_gpu = config.run.device is not Device.cpu and any(device.exists() for device in devices)
    caches = {
        name: (branch.rollout.cpu_kv_cache_gib, branch.parallel.world_size)
        for name, branch in config.branches.items()
        if not branch.frozen
    }
    if on_gpu or not caches:
        return
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    name, (largest, _) = max(caches.items(), key=lambda item: item[1][0])
    needed = sum(gib * ranks for gib, ranks in caches.values()) if alone else largest
    if needed > memory:
        each = f"{largest:g} GiB for each rank" + (f", {needed:g} for all" if alone else "")
        raise ConfigError(
            f"branches.{name}.rollout.cpu_kv_cache_gib: {each}, but this machine has {memory:.1f} GiB of "
            "memory; lower it, or use a machine with more"
        )
