"""A tensor known by name, shape and type, and the blocks of elements that it is handled in."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

BLOCK_ELEMENTS: Final = 1 << 18
"""Elements handled at once: 1 MiB in float32, so that a block's intermediates stay in a core's cache. DARE's
random masks and the digests of files are defined per block: changing it changes both."""


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
    """Elements [start, stop) of a block, in row-major order."""
    start = block * BLOCK_ELEMENTS
    return start, min(start + BLOCK_ELEMENTS, spec.num_elements)


def bytes_of(tensor: Tensor) -> memoryview:
    """A contiguous CPU tensor's own memory, as bytes."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


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
