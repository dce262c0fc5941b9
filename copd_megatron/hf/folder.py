"""A Hugging Face folder's tensors, read slice by slice."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from copd_megatron.model.shape import read_sizes
from copd_megatron.model.slots import Stack, as_published, slots

_DTYPE_BYTES = {
    "F64": 8,
    "F32": 4,
    "BF16": 2,
    "F16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "U8": 1,
}


class HFFolder:
    """The safetensors files of a Hugging Face folder, opened lazily, read slice by slice."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        files = sorted(self.folder.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(
                f"model.path: {folder} has no *.safetensors; convert the weights to safetensors first"
            )
        self._where: dict[str, Path] = {}
        self._transposes: dict[str, bool] = {}
        for file in files:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 - safe_open is no mapping
                    self._where[name] = file

    def names(self) -> list[str]:
        """Tensor names, sorted."""
        return sorted(self._where)

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        """One tensor, or its range [start, stop) along ``dim``, read from disk without the rest."""
        with safe_open(self._file(name), framework="pt") as handle:
            if dim is None:
                return handle.get_tensor(name)
            index = [slice(None)] * dim + [slice(start, stop)]
            return handle.get_slice(name)[tuple(index)]

    def read_expert(self, stack: Stack, expert: int) -> Tensor:
        """One expert's matrix of a stack, [outputs, inputs], read from disk without the rest."""
        transposed = self.transposes_experts(stack)
        with safe_open(self._where[stack.name], framework="pt") as handle:
            view = handle.get_slice(stack.name)
            if transposed:
                return view[expert : expert + 1, :, stack.columns][0].t()
            return view[expert : expert + 1, stack.columns][0]

    def transposes_experts(self, stack: Stack) -> bool:
        """As ``as_published``, of this folder; looked up once a layer."""
        if stack.prefix not in self._transposes:
            try:
                self._transposes[stack.prefix] = as_published(stack, self.shape)
            except ValueError as error:
                raise ValueError(f"{self.folder}: {error}") from None
        return self._transposes[stack.prefix]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor, without reading it."""
        with safe_open(self._file(name), framework="pt") as handle:
            return tuple(handle.get_slice(name).get_shape())

    def _file(self, name: str) -> Path:
        if name not in self._where:
            raise KeyError(
                f"{self.folder}: no tensor {name}; the folder holds {len(self._where)} tensors and does not "
                "match its config.json"
            )
        return self._where[name]

    def num_bytes(self, name: str) -> int:
        """Size of one tensor in bytes, without reading it."""
        with safe_open(self._where[name], framework="pt") as handle:
            piece = handle.get_slice(name)
            return math.prod(piece.get_shape()) * _DTYPE_BYTES[piece.get_dtype()]

    def iterate(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors as published, one at a time."""
        shape = read_sizes(self.folder)
        stacks = {slot.stack.name: slot.stack for slot in slots(shape, 1) if slot.stack is not None}
        for name in self.names():
            value = self.read(name)
            if name in stacks and not self.transposes_experts(stacks[name]):
                value = value.transpose(1, 2)
            yield name, value
