"""Packages that only some settings need, asked for before a run starts."""

from __future__ import annotations

from importlib.util import find_spec

from copd_megatron.config.schema import LoggingConfig
from copd_megatron.errors import ConfigError


def check_packages(options: LoggingConfig) -> None:
    """
    Raises:
        ConfigError: a package that the settings ask for is not installed; names it and the setting.
    """
    wanted = (
        ("tensorboard", options.tensorboard, "logging.tensorboard"),
        ("wandb", options.wandb.enabled, "logging.wandb.enabled"),
    )
    for package, asked, setting in wanted:
        if asked and not is_installed(package):
            raise ConfigError(
                f"{setting}: the package {package} is not installed in this environment; "
                f"run `pip install {package}` in it, or set {setting}=false"
            )


def is_installed(package: str) -> bool:
    """Whether ``import package`` would find a real package: a folder of that name in the working directory
    (wandb leaves one) does not count."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None
