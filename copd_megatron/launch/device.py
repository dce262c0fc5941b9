"""Whether the settings can run on what this machine has, as far as it shows without importing torch."""

from __future__ import annotations

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
