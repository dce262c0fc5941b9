"""The checkpoint formats that merges and conversions read and write."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from copd_megatron.checkpoint.manifest import MANIFEST
from copd_megatron.formats.experts import Stacked, Unstacked
from copd_megatron.formats.hf import HFSink, HFSource
from copd_megatron.formats.tensors import TensorSink, TensorSource
from copd_megatron.hf.model_config import read_sizes
from copd_megatron.hf.template import Template
from copd_megatron.hf.tensors import TensorSpec
from copd_megatron.model.shape import ModelShape

Format = Literal["hf", "megatron"]
"""Hugging Face's safetensors; Megatron's distributed format."""


def open_source(
    path: str | Path, *, model_path: Path | None = None, single_experts: bool = False
) -> TensorSource:
    """Opens a checkpoint: a Hugging Face folder, a branch's folder in Megatron's distributed format, or a
    joint checkpoint with one trained branch.

    Args:
        model_path: Hugging Face folder with configuration and tokenizer for a folder in Megatron's format;
            None: as the checkpoint knows it.
        single_experts: every expert under a name of its own, also where a Hugging Face folder stacks them.

    Raises:
        FileNotFoundError: there is nothing at ``path``, or no checkpoint.
        CheckpointError, ValueError: it is damaged.
    """
    location = Path(path)
    if not location.exists():
        raise FileNotFoundError(f"there is no {path}; give a local folder")
    if (location / ".metadata").is_file() or (location / MANIFEST).is_file():
        # imported where it is needed: torch.distributed.checkpoint takes time and memory
        from copd_megatron.formats.megatron_source import MegatronSource

        megatron = MegatronSource(location, model_path=model_path)
        assert megatron.dims is not None
        if megatron.dims.stacks_experts and not single_experts:
            return Stacked(megatron, megatron.dims)
        return megatron
    if location.is_dir() and any(location.glob("*.safetensors")):
        folder = HFSource(location)
        return Unstacked(folder, read_sizes(location, "model")) if single_experts else folder
    raise FileNotFoundError(
        f"{path} holds no checkpoint that can be read; give a Hugging Face folder with *.safetensors, or a "
        "branch's folder in Megatron's distributed format"
    )


def make_sink(
    kind: Format,
    folder: Path,
    specs: Sequence[TensorSpec],
    shard_bytes: int,
    *,
    dims: ModelShape | None,
    companions: Path,
    label: str,
    template: Template | None = None,
    fsync: bool,
) -> TensorSink:
    """A result to be written.

    Args:
        dims: the model's sizes, where an input records them; else read from ``companions``.
        companions: folder with the model's config.json.
        label: what messages call the tensors' origin.
        template: files of a Hugging Face folder that the result is to have, or to keep for a conversion back.

    Raises:
        ConfigError, ValueError: Megatron's format cannot hold this model.
    """
    if kind == "hf":
        fitted = template and template.fitted({spec.name: spec for spec in specs})
        return (
            HFSink(folder, fitted, fsync=fsync)
            if fitted
            else HFSink.of(folder, specs, shard_bytes, fsync=fsync)
        )
    from copd_megatron.formats.megatron_sink import MegatronSink

    return MegatronSink(
        folder,
        dims or read_sizes(companions, "model"),
        specs,
        shard_bytes,
        label=label,
        template=template,
        fsync=fsync,
    )
