"""The models that a configuration names, read without their weights."""

from __future__ import annotations

from copd_megatron.config.schema import Config
from copd_megatron.hf.model_config import read_model_shape
from copd_megatron.model.shape import ModelShape


def read_model_shapes(config: Config) -> dict[str, ModelShape]:
    """The shape of each branch's starting model, by branch name; each folder is read once.

    Raises:
        ConfigError: as :func:`read_model_shape`.
    """
    read: dict[str, ModelShape] = {}
    shapes = {}
    for name, branch in config.branches.items():
        folder = branch.model_path or config.model.path
        if folder not in read:
            key = f"branches.{name}.model_path" if branch.model_path else "model.path"
            read[folder] = read_model_shape(folder, key)
        shapes[name] = read[folder]
    return shapes
