"""What this machine computes on: CPU or CUDA, and in which type."""

from __future__ import annotations

import torch

from copd_megatron.config.schema import Config, Device
from copd_megatron.errors import ConfigError


def uses_cuda(config: Config) -> bool:
    """Whether the actors run on GPUs.

    Raises:
        ConfigError: CUDA is asked for where torch sees none, or the CPU where it sees some.
    """
    if config.run.device is Device.cuda and not torch.cuda.is_available():
        raise ConfigError("run.device=cuda, but torch sees no CUDA device; `copd doctor` shows what is here")
    if config.run.device is Device.cpu and torch.cuda.is_available():
        raise ConfigError(
            "run.device=cpu on a machine with GPUs: hide them with CUDA_VISIBLE_DEVICES= (empty)"
        )
    return torch.cuda.is_available()


def model_dtype(config: Config) -> torch.dtype:
    """The compute type that ``model.dtype`` names on this machine."""
    if config.model.dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    dtype = getattr(torch, config.model.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype
