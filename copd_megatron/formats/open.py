"""The checkpoint formats that a merge reads and writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from copd_megatron.checkpoint.manifest import MANIFEST
from copd_megatron.formats.safetensors import SafetensorsSink, SafetensorsSource
from copd_megatron.formats.tensors import TensorSink, TensorSource, TensorSpec
from copd_megatron.model.shape import ModelShape, read_sizes

Format = Literal["hf", "megatron"]
"""Hugging Face's safetensors; Megatron's distributed format."""


def open_source(path: str | Path) -> TensorSource:
    """Opens a checkpoint: a Hugging Face folder, a branch's folder in Megatron's distributed format, or a
    joint checkpoint with one trained branch.

    Raises:
        FileNotFoundError: there is nothing at ``path``, or no checkpoint.
        CheckpointError, ValueError: it is damaged.
    """
    location = Path(path)
    if not location.exists():
        raise FileNotFoundError(f"merge: there is no {path}; give a local folder")
    if (location / ".metadata").is_file() or (location / MANIFEST).is_file():
        # imported where it is needed: torch.distributed.checkpoint takes time and memory
        from copd_megatron.formats.megatron import MegatronSource

        return MegatronSource(location)
    if location.is_dir() and any(location.glob("*.safetensors")):
        return SafetensorsSource(location)
    raise FileNotFoundError(
        f"merge: {path} holds no checkpoint that can be read; give a Hugging Face folder with *.safetensors, "
        "or a branch's folder in Megatron's distributed format"
    )


def make_sink(
    kind: Format,
    folder: Path,
    specs: Sequence[TensorSpec],
    shard_bytes: int,
    *,
    dims: ModelShape | None,
    companions: Path,
    fsync: bool,
) -> TensorSink:
    """A result to be written.

    Args:
        dims: the model's sizes, where an input records them; else read from ``companions``.
        companions: folder with the model's config.json.

    Raises:
        ConfigError, ValueError: Megatron's format cannot hold this model.
    """
    if kind == "hf":
        return SafetensorsSink(folder, specs, shard_bytes, fsync=fsync)
    from copd_megatron.formats.megatron import MegatronSink

    return MegatronSink(folder, dims or read_sizes(companions, "merge"), specs, shard_bytes, fsync=fsync)
