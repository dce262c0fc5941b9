"""Where a merge reads from and writes to: two small protocols, so that every checkpoint format can plug in
(``formats`` lists them).

Tensors are handled as flat ranges of their elements in row-major order. A source fills a buffer that the
caller owns; a sink takes values at a position. Neither ever holds a whole model, and both are called from
several threads at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from copd_megatron.model.shape import ModelShape

BLOCK_ELEMENTS = 1 << 18
"""Elements handled at once: 1 MiB in float32, so that a block's intermediates stay in a core's cache. DARE's
random masks and the digests of shards are defined per block: changing it changes both."""

DTYPE_NAMES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
"""Floating-point types that a recipe may name."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's name, shape and type, known without reading it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.dtype.itemsize

    @property
    def num_blocks(self) -> int:
        return -(-self.num_elements // BLOCK_ELEMENTS)


def block_range(spec: TensorSpec, block: int) -> tuple[int, int]:
    """Elements [start, stop) of a block."""
    start = block * BLOCK_ELEMENTS
    return start, min(start + BLOCK_ELEMENTS, spec.num_elements)


class TensorSource(Protocol):
    """A model's tensors, readable range by range. Used from several threads at once."""

    label: str
    """What messages call it; a path."""
    companions: Path | None
    """Folder with config.json, tokenizer and processor files; None: there are none."""
    dims: ModelShape | None
    """The model's sizes, where the checkpoint itself records them."""

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
        """The digest of a shard as it lies there, in ``ShardWriter.close``'s manner; None: it is not there
        or not of the right size."""

    def finish(self) -> None:
        """Writes what ties the shards together. Called once, by one process, after all shards."""


def cut[T](items: Sequence[T], limit: int, size: Callable[[T], int]) -> list[list[T]]:
    """Items in order, in groups of at most ``limit`` in all, unless a single one is larger."""
    groups: list[list[T]] = [[]]
    total = 0
    for item in items:
        if groups[-1] and total + size(item) > limit:
            groups.append([])
            total = 0
        groups[-1].append(item)
        total += size(item)
    return groups
