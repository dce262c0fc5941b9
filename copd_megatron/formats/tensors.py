"""Where a merge or a conversion reads from and writes to: two small protocols, so that every checkpoint
format can plug in.

Tensors are handled as flat ranges of their elements in row-major order. A source fills a buffer that the
caller owns; a sink takes values at a position. Neither ever holds a whole model, and both are called from
several threads at once.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from copd_megatron.hf.template import Template
from copd_megatron.hf.tensors import TensorSpec
from copd_megatron.model.shape import ModelShape


class TensorSource(Protocol):
    """A model's tensors, readable range by range. Used from several threads at once."""

    @property
    def label(self) -> str:
        """What messages call it; a path."""

    @property
    def companions(self) -> Path | None:
        """Folder with config.json, tokenizer and processor files; None: there are none."""

    @property
    def dims(self) -> ModelShape | None:
        """The model's sizes, where the checkpoint itself records them."""

    @property
    def template(self) -> Template | None:
        """How the tensors lie in the files of the model's Hugging Face folder, where that is known."""

    def names(self) -> Sequence[str]:
        """Tensor names, sorted."""

    def spec(self, name: str) -> TensorSpec:
        """Raises KeyError when there is no such tensor."""

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Fills ``out`` (1-D, contiguous, of the tensor's type) with elements [start, start + len(out))."""

    def identity(self) -> str:
        """Text that changes when the content does: by it an interrupted merge knows its inputs again."""

    def problems(self) -> list[str]:
        """Files that do not have the digests recorded for them, one line each. Reads them all; empty:
        nothing is wrong, or nothing is recorded."""


def identities(sources: Sequence[TensorSource]) -> list[str]:
    """What each source holds now."""
    return [source.identity() for source in sources]


def refuse_changed(sources: Sequence[TensorSource], opened: Sequence[str]) -> None:
    """Raises OSError if a source is not what it was when it was opened: what was read of it is of parts."""
    for source, before, now in zip(sources, opened, identities(sources), strict=True):
        if before != now:
            raise OSError(
                errno.ESTALE,
                "was changed while it was read; run it again when nobody writes to it",
                source.label,
            )


def read_whole(source: TensorSource, name: str) -> Tensor:
    """A whole tensor of a source."""
    spec = source.spec(name)
    out = torch.empty(spec.shape, dtype=spec.dtype)
    source.read_into(name, 0, out.view(-1))
    return out


class ShardWriter(Protocol):
    """One shard being written. Used from several threads at once."""

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Puts ``values`` (1-D, of the tensor's type, one block) at elements [start, ...)."""

    def close(self) -> str:
        """Ends the shard once all is written; returns the digest of its content."""

    def abort(self) -> None:
        """Lets go of the shard without finishing it."""


class TensorSink(Protocol):
    """A model being written, shard by shard; the shards may be written by different processes."""

    @property
    def shards(self) -> Sequence[Sequence[TensorSpec]]:
        """What each shard holds."""

    @property
    def companions(self) -> Path:
        """Folder for configuration, tokenizer and processor files."""

    def open(self, index: int) -> ShardWriter:
        """Starts a shard (again, when a part of it is there)."""

    def digest(self, index: int) -> str | None:
        """The digest of a shard as it is on the disk, as ``ShardWriter.close`` returns it; None: it is not
        there, or not of the right size."""

    def finish(self) -> None:
        """Writes what ties the shards together. Called once, by one process, after all shards."""
