"""Checks, before a run starts, for packages that only some settings need."""

from __future__ import annotations

from importlib.util import find_spec

from copd_megatron.config.schema import LoggingConfig
from copd_megatron.errors import ConfigError


def check_packages(options: LoggingConfig) -> None:
    """Refuses settings whose packages are not installed.

    Raises:
        ConfigError: names the package and the setting that needs it.
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
    """Whether ``import package`` would find a real package. A plain folder of that name in the working
    directory, such as the one wandb creates, does not count."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None
