"""Memory that is reused: each thread's named work buffers, one block long.

A new tensor of a megabyte gets new pages from the operating system, and clearing those takes several times as
long as the arithmetic on them.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from copd_megatron.hf.tensors import BLOCK_ELEMENTS


class Scratch(threading.local):
    """Buffers by role and type. What a role holds is valid until the same thread asks for it again."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype], Tensor] = {}

    def get(self, role: str, length: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor, [length] <= [BLOCK_ELEMENTS]."""
        key = role, dtype
        if key not in self._held:
            self._held[key] = torch.empty(BLOCK_ELEMENTS, dtype=dtype)
        return self._held[key][:length]

    def cast(self, role: str, value: Tensor, dtype: torch.dtype) -> Tensor:
        """``value`` in ``dtype``, copied in any case."""
        return self.get(role, value.numel(), dtype).copy_(value)


scratch = Scratch()
