"""A configuration of two branches, for tests of reading and checking."""

from __future__ import annotations

from pathlib import Path

from copd_megatron.config import Config, load_config

YAML = """
model:
  path: base
branch_defaults:
  num_prompts_per_step: 16
  parallel: {tensor_model_parallel_size: 2}
branches:
  text:
    data: {train: [text.tar]}
  image:
    num_prompts_per_step: 8
    data: {train: [image.tar]}
    parallel: {data_parallel_size: 2}
    rollout: {tensor_parallel_size: 2}
"""


def write(folder: Path, text: str = YAML, name: str = "run.yaml") -> Path:
    """Writes a configuration; returns its path."""
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def load(folder: Path, *overrides: str) -> Config:
    """``YAML`` with overrides, by way of a file in ``folder``."""
    return load_config(write(folder), overrides)
