"""Experts of a mixture under two kinds of names: each by itself, as Megatron and vLLM know them, or all of a
layer stacked in one tensor and transposed, as Qwen3-VL's Hugging Face folders hold them."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from copd_megatron.formats.hf import HFSource
from copd_megatron.formats.tensors import TensorSource, read_whole
from copd_megatron.hf.template import Template
from copd_megatron.hf.tensors import TensorSpec
from copd_megatron.model.shape import ModelShape
from copd_megatron.model.slots import Slot, Stack, slots


class Renamed[T: TensorSource]:
    """A source whose tensors, but for experts, are those of another."""

    def __init__(self, source: T, dims: ModelShape) -> None:
        self._source = source
        self.dims: ModelShape | None = dims
        self._experts = [(slot, slot.stack) for slot in slots(dims, 1) if slot.stack is not None]
        self._last = _LastMatrix()

    @property
    def label(self) -> str:
        return self._source.label

    @property
    def companions(self) -> Path | None:
        return self._source.companions

    @property
    def template(self) -> Template | None:
        return self._source.template

    def identity(self) -> str:
        return self._source.identity()

    def problems(self) -> list[str]:
        return self._source.problems()


class Stacked(Renamed[TensorSource]):
    """A source that names every expert, as a published Hugging Face folder has it."""

    def __init__(self, source: TensorSource, dims: ModelShape) -> None:
        super().__init__(source, dims)
        self._stacks: dict[str, Stack] = {}
        self._parts: dict[tuple[str, int], list[str]] = {}
        """Stack and expert to the tensors that lie in it side by side: gate and up, or down."""
        for slot, stack in self._experts:
            assert slot.expert is not None
            self._stacks[stack.name] = stack
            self._parts.setdefault((stack.name, slot.expert), []).append(slot.name)

    def names(self) -> Sequence[str]:
        inside = {slot.name for slot, _ in self._experts}
        return sorted([*(name for name in self._source.names() if name not in inside), *self._stacks])

    def spec(self, name: str) -> TensorSpec:
        if name not in self._stacks:
            return self._source.spec(name)
        dtype = self._source.spec(self._parts[name, 0][0]).dtype
        return TensorSpec(name, self._stacks[name].shape, dtype)

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        if name not in self._stacks:
            self._source.read_into(name, start, out)
            return
        size, stop = math.prod(self._stacks[name].shape[1:]), start + out.numel()
        for expert in range(start // size, -(-stop // size)):
            low, high = max(start, expert * size), min(stop, (expert + 1) * size)
            matrix = self._last.get((name, expert), lambda key: self._matrix(*key))
            out[low - start : high - start] = matrix[low - expert * size : high - expert * size]

    def _matrix(self, name: str, expert: int) -> Tensor:
        """One expert as the stack holds it, [inputs * outputs]."""
        parts = [read_whole(self._source, part) for part in self._parts[name, expert]]
        return torch.cat(parts).t().reshape(-1)


class Unstacked(Renamed[HFSource]):
    """A Hugging Face folder that stacks its experts, with a name for each of them."""

    def __init__(self, source: HFSource, dims: ModelShape) -> None:
        """
        Raises:
            ValueError: stacks of another shape than config.json implies.
        """
        super().__init__(source, dims)
        present = set(source.names())
        self._found: dict[str, tuple[Slot, Stack]] = {
            slot.name: (slot, stack) for slot, stack in self._experts if stack.name in present
        }
        for _, stack in self._found.values():
            with contextlib.suppress(KeyError):  # a layer lacks one of its stacks: names() shows it
                source.transposes_experts(stack)

    def names(self) -> Sequence[str]:
        stacks = {stack.name for _, stack in self._experts}
        return sorted([*(name for name in self._source.names() if name not in stacks), *self._found])

    def spec(self, name: str) -> TensorSpec:
        if name not in self._found:
            return self._source.spec(name)
        slot, stack = self._found[name]
        return TensorSpec(name, slot.shape, self._source.spec(stack.name).dtype)

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        if name not in self._found:
            self._source.read_into(name, start, out)
            return
        out.copy_(self._last.get(name, self._matrix)[start : start + out.numel()])

    def _matrix(self, name: str) -> Tensor:
        """One expert's part, [outputs * inputs]."""
        slot, stack = self._found[name]
        assert slot.expert is not None
        return self._source.read_expert(stack, slot.expert).reshape(-1)


class _LastMatrix(threading.local):
    """Each thread's last expert: it is asked for block by block."""

    def __init__(self) -> None:
        self._key: object = None
        self._value: Tensor | None = None

    def get[K](self, key: K, read: Callable[[K], Tensor]) -> Tensor:
        """The matrix of ``key``, read if another was asked for before."""
        if self._value is None or self._key != key:
            self._value = read(key)
            self._key = key
        return self._value
