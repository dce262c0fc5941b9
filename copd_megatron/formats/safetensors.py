"""Hugging Face folders as merge source and sink: safetensors read and written in place, range by range.

A safetensors file is eight bytes of header length, a JSON header with every tensor's type, shape and byte
range, and the bytes. Shapes are known before a merge starts, so the header is written first and every block
then goes straight to its place.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from copd_megatron.formats.planned_file import Extent, PlannedFile, PlannedFileWriter, bytes_of
from copd_megatron.formats.tensors import TensorSpec, cut
from copd_megatron.hf.companions import write_index
from copd_megatron.model.shape import ModelShape

_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


class SafetensorsSource:
    """The safetensors files of a Hugging Face folder, read with ``pread`` into the caller's buffers.

    Memory mapping would count every page ever touched as this process's memory and copies as much.
    """

    def __init__(self, folder: str | Path) -> None:
        """Raises FileNotFoundError or ValueError: no file, a missing file, or a torn one."""
        self.label = str(folder)
        self.companions: Path | None = Path(folder)
        self.dims: ModelShape | None = None
        self._files: list[_File] = []
        self._where: dict[str, tuple[_File, TensorSpec, int]] = {}
        for path in _files_of(Path(folder)):
            file = _File(path)
            self._files.append(file)
            for spec, offset in file.tensors():
                if spec.name in self._where:
                    raise ValueError(
                        f"{folder}: {spec.name} is in {self._where[spec.name][0].path.name} and in "
                        f"{path.name}; remove the file that does not belong"
                    )
                self._where[spec.name] = (file, spec, offset)

    def names(self) -> list[str]:
        return sorted(self._where)

    def spec(self, name: str) -> TensorSpec:
        return self._where[name][1]

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Raises OSError when the file ends early (it was changed while being read)."""
        file, spec, offset = self._where[name]
        view = bytes_of(out)
        position, done = offset + start * spec.dtype.itemsize, 0
        while done < len(view):
            count = os.preadv(file.descriptor, [view[done:]], position + done)
            if count == 0:
                raise OSError(f"{file.path}: ends at byte {position + done}, inside {name}")
            done += count

    def identity(self) -> str:
        return "\n".join(file.identity for file in self._files)

    def problems(self) -> list[str]:
        return []


class _File:
    """One open safetensors file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY)
        status = os.fstat(self.descriptor)
        length = int.from_bytes(os.pread(self.descriptor, 8, 0), "little")
        header = os.pread(self.descriptor, length, 8) if 8 + length <= status.st_size else b""
        try:
            self._header: dict[str, Any] = json.loads(header)
        except ValueError as error:
            raise ValueError(f"{path}: not a safetensors file, or torn; copy it again") from error
        self._data_start, self._size = 8 + length, status.st_size
        seal = hashlib.sha256(header).hexdigest()[:16]
        self.identity = f"{path.name} {status.st_size} {status.st_mtime_ns} {seal}"

    def __del__(self) -> None:
        if descriptor := getattr(self, "descriptor", None):
            os.close(descriptor)

    def tensors(self) -> list[tuple[TensorSpec, int]]:
        """Each tensor with its first byte's place in the file."""
        found = []
        for name, entry in self._header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] not in _DTYPES:
                raise ValueError(
                    f"{self.path}: {name} has type {entry['dtype']}, known are {', '.join(_DTYPES)}"
                )
            spec = TensorSpec(name, tuple(entry["shape"]), _DTYPES[entry["dtype"]])
            begin, end = entry["data_offsets"]
            if end - begin != spec.num_bytes or self._data_start + end > self._size:
                raise ValueError(
                    f"{self.path}: {name} needs bytes up to {self._data_start + end}, the file has "
                    f"{self._size}; it is truncated, copy it again"
                )
            found.append((spec, self._data_start + begin))
        return found


class SafetensorsSink:
    """A Hugging Face folder's weights, written shard by shard.

    Args:
        folder: exists; several processes may write different shards of it.
        specs: all tensors, in the order in which they go to shards.
        shard_bytes: largest shard, unless a single tensor is larger.
        fsync: a shard is closed only when the disk has it.
    """

    def __init__(
        self, folder: Path, specs: Sequence[TensorSpec], shard_bytes: int, *, fsync: bool = False
    ) -> None:
        self.folder, self._fsync = folder, fsync
        self.shards = cut(specs, shard_bytes, lambda spec: spec.num_bytes)

    @property
    def companions(self) -> Path:
        return self.folder

    def open(self, index: int) -> PlannedFileWriter:
        return PlannedFileWriter(self._plan(index), fsync=self._fsync)

    def digest(self, index: int) -> str | None:
        return self._plan(index).digest()

    def finish(self) -> None:
        where = {
            spec.name: self._path(index).name for index, shard in enumerate(self.shards) for spec in shard
        }
        write_index(self.folder, where, sum(spec.num_bytes for shard in self.shards for spec in shard))

    def _plan(self, index: int) -> PlannedFile:
        specs = self.shards[index]
        header, offsets = _header(specs)
        sizes = {spec.name: spec.dtype.itemsize for spec in specs}

        def extents(name: str, start: int, stop: int) -> list[Extent]:
            return [(offsets[name] + start * sizes[name], (stop - start) * sizes[name])]

        return PlannedFile(
            path=self._path(index),
            frame=((0, header),),
            specs=tuple(specs),
            extents=extents,
            num_bytes=max((offsets[s.name] + s.num_bytes for s in specs), default=len(header)),
        )

    def _path(self, index: int) -> Path:
        return self.folder / shard_name(index + 1, len(self.shards))


def shard_name(number: int, count: int) -> str:
    """Hugging Face's file name of shard ``number`` (from 1)."""
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _header(specs: Sequence[TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """The file's first bytes, and where in the file each tensor starts. Wider types come first, so that all
    are aligned, as the safetensors library writes them."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset, offsets = 0, {}
    for spec in sorted(specs, key=lambda s: (-s.dtype.itemsize, s.name)):
        entries[spec.name] = {
            "dtype": _CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.num_bytes],
        }
        offsets[spec.name] = offset
        offset += spec.num_bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, {n: o + 8 + len(text) for n, o in offsets.items()}


def _files_of(folder: Path) -> list[Path]:
    """The files that the index names, or all ``*.safetensors`` where there is no index."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    if missing := [file.name for file in files if not file.is_file()]:
        raise FileNotFoundError(
            f"{folder}: {index.name} names {', '.join(missing[:5])}, not there; copy again"
        )
    return files
