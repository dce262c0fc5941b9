"""A Hugging Face folder's tensors: by range of elements, by slice along a dimension, expert by expert.

Read with ``pread`` into memory of the caller's or of the size asked for. Memory mapping would count every
page ever touched as this process's memory, and copies as much.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from copd_megatron.hf.companions import read_index, weight_files
from copd_megatron.hf.header import FileHeader, read_layout
from copd_megatron.hf.model_config import read_sizes
from copd_megatron.hf.tensors import TensorSpec, bytes_of
from copd_megatron.model.slots import Stack, as_published, slots
from copd_megatron.untrusted.regular_file import open_regular

logger = logging.getLogger(__name__)

_BUFFER_BYTES: Final = 8 * 2**20


class HFFolder:
    """The tensors of a Hugging Face folder. Safe to use from several threads."""

    def __init__(self, folder: str | Path) -> None:
        """
        Raises:
            FileNotFoundError: no weights, or a file of the index is missing.
            ValueError: a file is torn or no safetensors file, or files and index contradict each other.
        """
        self.folder = Path(folder)
        self._files = [_File(path) for path in weight_files(self.folder)]
        self._where = self._locate()
        self._transposes: dict[str, bool] = {}

    @property
    def layouts(self) -> list[FileHeader]:
        """Its files, by name."""
        return [file.layout for file in self._files]

    def names(self) -> list[str]:
        """Tensor names, sorted."""
        return sorted(self._where)

    def spec(self, name: str) -> TensorSpec:
        """A tensor's shape and type. Raises KeyError when there is no such tensor."""
        return self._find(name).spec

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises KeyError when there is no such tensor."""
        return self._find(name).spec.shape

    def identity(self) -> str:
        """Text that changes when the content does."""
        return "\n".join(file.identity() for file in self._files)

    # ---- reading -----------------------------------------------------------------------------------------

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Fills ``out`` (contiguous, on the CPU, of the tensor's type) with the elements from ``start`` on.
        Elements count in row-major order.

        Raises:
            KeyError: no such tensor.
            OSError: the file ends early (it was changed while being read).
        """
        place = self._find(name)
        assert out.dtype is place.spec.dtype and 0 <= start <= place.spec.num_elements - out.numel(), name
        place.file.read(place.begin + start * place.spec.dtype.itemsize, bytes_of(out))

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        """A tensor, or its range [start, stop) along ``dim``, holding a bounded buffer of the rest."""
        spec = self.spec(name)
        if dim is None:
            dim, stop = 0, None
        if not spec.shape:
            out = torch.empty((), dtype=spec.dtype)
            self.read_into(name, 0, out)
            return out
        stop = spec.shape[dim] if stop is None else min(stop, spec.shape[dim])
        out = torch.empty((*spec.shape[:dim], stop - start, *spec.shape[dim + 1 :]), dtype=spec.dtype)
        rows = out.view(math.prod(spec.shape[:dim]), -1) if out.numel() else out.view(0, 1)
        inner = math.prod(spec.shape[dim + 1 :])
        width = spec.shape[dim] * inner
        if rows.shape[1] == width or len(rows) == 1:  # what is wanted lies in one piece
            self.read_into(name, start * inner, rows)
            return out
        step = max(_BUFFER_BYTES // max(width * spec.dtype.itemsize, 1), 1)
        for row in range(0, len(rows), step):
            piece = torch.empty(min(step, len(rows) - row), width, dtype=spec.dtype)
            self.read_into(name, row * width, piece)
            rows[row : row + len(piece)] = piece[:, start * inner : stop * inner]
        return out

    def read_expert(self, stack: Stack, expert: int) -> Tensor:
        """One expert's matrix of a stack, [outputs, inputs], read from disk without the others."""
        whole = self.read(stack.name, 0, expert, expert + 1)[0]
        if self.transposes_experts(stack):
            return whole[:, stack.columns].t()
        return whole[stack.columns]

    def transposes_experts(self, stack: Stack) -> bool:
        """As ``as_published``, of this folder; looked up once a layer."""
        if stack.prefix not in self._transposes:
            try:
                self._transposes[stack.prefix] = as_published(stack, self.shape)
            except ValueError as error:
                raise ValueError(f"{self.folder}: {error}") from None
        return self._transposes[stack.prefix]

    def iterate(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors as published, one at a time."""
        shape = read_sizes(self.folder)
        stacks = {slot.stack.name: slot.stack for slot in slots(shape, 1) if slot.stack is not None}
        for name in self.names():
            value = self.read(name)
            if name in stacks and not self.transposes_experts(stacks[name]):
                value = value.transpose(1, 2)
            yield name, value

    # ---- finding -----------------------------------------------------------------------------------------

    def _find(self, name: str) -> _Place:
        if name not in self._where:
            raise KeyError(
                f"{self.folder}: no tensor {name}; the folder holds {len(self._where)} tensors and does not "
                "match its config.json"
            )
        return self._where[name]

    def _locate(self) -> dict[str, _Place]:
        """Where each tensor lies. Where there is an index, it decides."""
        where, left_out = read_index(self.folder), []
        found: dict[str, _Place] = {}
        for file in self._files:
            begins = file.layout.begins
            for spec in file.layout.specs:
                if where is None or where.get(spec.name) == file.layout.name:
                    found[spec.name] = _Place(file, begins[spec.name], spec)
                else:
                    left_out.append(f"{spec.name} in {file.layout.name}")
        if where is not None and (absent := sorted(where.keys() - found.keys())):
            raise ValueError(
                f"{self.folder}: {absent[0]} is not in {where[absent[0]]}, where the index has it "
                f"({len(absent)} tensors in all); copy the model again"
            )
        if left_out:
            logger.warning(
                "%s: %d tensors that the index does not name there are left out, %s for one",
                self.folder,
                len(left_out),
                left_out[0],
            )
        return found


class _File:
    """One open safetensors file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # Links are followed: of Hugging Face's cache, and of folders that share their weights.
        self._file = open_regular(path, buffered=False)
        self._descriptor = self._file.fileno()
        weakref.finalize(self, self._file.close)
        self.layout = read_layout(path, self._descriptor)

    def read(self, position: int, out: memoryview) -> None:
        """Fills ``out`` from byte ``position`` on. Raises OSError when the file ends early."""
        read_exactly(self._descriptor, out, position, self.path)

    def identity(self) -> str:
        status = os.fstat(self._descriptor)
        seal = hashlib.sha256(self.layout.header).hexdigest()[:16]
        return f"{self.path.name} {status.st_size} {status.st_mtime_ns} {seal}"


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies."""

    file: _File
    begin: int
    """Its first byte."""
    spec: TensorSpec


def read_exactly(descriptor: int, out: memoryview, position: int, path: Path) -> None:
    """Fills ``out`` from a file. Raises OSError if the file ends before."""
    done = 0
    while done < len(out):
        count = os.preadv(descriptor, [out[done:]], position + done)
        if count == 0:
            raise OSError(f"{path} ends at byte {position + done}: it is truncated, copy it again")
        done += count
