"""Hugging Face folders: safetensors read by range and written tensor by tensor, and the files beside them.

A safetensors file is eight bytes of header length, a JSON header, and the tensors' bytes. Sizes are known
beforehand, so the header is written first and the tensors follow one at a time.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

INDEX: Final = "model.safetensors.index.json"
_COMPANIONS = {".json", ".txt", ".jinja", ".model"}
DTYPES: Final[Mapping[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
CODES: Final[Mapping[torch.dtype, str]] = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A tensor known by name."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class FileLayout:
    """One safetensors file: its header, byte for byte, and the tensors in the order of their bytes."""

    name: str
    header: bytes
    specs: tuple[Spec, ...]


def file_layouts(folder: Path) -> list[FileLayout]:
    """The safetensors files of a folder, from their headers alone.

    Raises:
        FileNotFoundError: there are none.
        ValueError: a file is torn, or holds a type this module does not know.
    """
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"{folder} has no *.safetensors; give a Hugging Face folder with weights")
    return [_layout(path) for path in paths]


def _layout(path: Path) -> FileLayout:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
    try:
        specs = specs_of_header(header)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no safetensors file, or torn: {error}; copy it again") from error
    needed = 8 + length + sum(spec.num_bytes for spec in specs)
    if path.stat().st_size != needed:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, its header says {needed}; copy it again")
    return FileLayout(name=path.name, header=header, specs=specs)


def specs_of_header(header: bytes) -> tuple[Spec, ...]:
    """The tensors of a safetensors header in the order of their bytes."""
    entries = [(name, entry) for name, entry in json.loads(header).items() if name != "__metadata__"]
    entries.sort(key=lambda item: item[1]["data_offsets"])
    return tuple(
        Spec(name=name, shape=tuple(entry["shape"]), dtype=DTYPES[entry["dtype"]]) for name, entry in entries
    )


def plan_files(
    specs: Sequence[Spec], *, shard_bytes: int, metadata: Mapping[str, str] | None = None
) -> list[FileLayout]:
    """Files for tensors in the order given, each of at most ``shard_bytes`` (or one larger tensor)."""
    shards: list[list[Spec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.num_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.num_bytes
    count = len(shards)
    names = (
        ["model.safetensors"]
        if count == 1
        else [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    )
    told = {"format": "pt"} if metadata is None else dict(metadata)
    return [make_layout(name, shard, told) for name, shard in zip(names, shards, strict=True)]


def make_layout(name: str, specs: Sequence[Spec], metadata: Mapping[str, str]) -> FileLayout:
    """A file with these tensors in this order."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    begin = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [begin, begin + spec.num_bytes],
        }
        begin += spec.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    return FileLayout(name=name, header=text + b" " * (-len(text) % 8), specs=tuple(specs))


def write_file(path: Path, layout: FileLayout, pieces: Callable[[Spec], Iterable[Tensor]]) -> None:
    """Writes one file, holding one piece of a tensor at a time.

    Args:
        pieces: a tensor's values in order, in contiguous pieces of its type.

    Raises:
        OSError: the disk is full.
        ValueError: the pieces are not as many bytes as the header says.
    """
    with path.open("wb", buffering=0) as file:
        write_all(file.fileno(), len(layout.header).to_bytes(8, "little") + layout.header)
        for spec in layout.specs:
            written = 0
            for piece in pieces(spec):
                data = bytes_of(piece)
                write_all(file.fileno(), data)
                written += len(data)
            if written != spec.num_bytes:
                raise ValueError(f"{path}: {spec.name} came with {written} bytes of {spec.num_bytes}")
        os.fsync(file.fileno())


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """``os.write`` until everything is written."""
    left = memoryview(data)
    while len(left):
        left = left[os.write(descriptor, left) :]


def bytes_of(tensor: Tensor) -> memoryview:
    """A contiguous CPU tensor's bytes, without a copy."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


class SafetensorsReader:
    """The tensors of a Hugging Face folder, read by range with ``pread``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.layouts = file_layouts(folder)
        self._where: dict[str, tuple[Path, int, Spec]] = {}
        for layout in self.layouts:
            begin = 8 + len(layout.header)
            for spec in layout.specs:
                self._where[spec.name] = (folder / layout.name, begin, spec)
                begin += spec.num_bytes

    def specs(self) -> dict[str, Spec]:
        """All tensors by name."""
        return {name: spec for name, (_, _, spec) in self._where.items()}

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Fills ``out`` (contiguous, of the tensor's type) with elements [start, ...) in row-major order."""
        path, begin, spec = self._where[name]
        with path.open("rb", buffering=0) as file:
            read_exactly(file.fileno(), bytes_of(out), begin + start * spec.dtype.itemsize, path)


def read_exactly(descriptor: int, out: memoryview, position: int, path: Path) -> None:
    """Fills ``out`` from a file. Raises OSError if the file ends before."""
    done = 0
    while done < len(out):
        count = os.preadv(descriptor, [out[done:]], position + done)
        if count == 0:
            raise OSError(f"{path} ends at byte {position + done}: it is truncated, copy it again")
        done += count


# ---- the files beside the tensors ------------------------------------------------------------------------


def companions(folder: Path) -> list[Path]:
    """Configuration, tokenizer, processor and template files of a folder."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix in _COMPANIONS and path.name != INDEX
    ]


def copy_files(paths: Iterable[Path], target: Path) -> None:
    """Copies files under their names."""
    for path in paths:
        shutil.copyfile(path, target / path.name)


def write_index(folder: Path, layouts: Sequence[FileLayout]) -> None:
    """The index over several files; a single one needs none."""
    if len(layouts) > 1:
        where = {spec.name: layout.name for layout in layouts for spec in layout.specs}
        total = sum(spec.num_bytes for layout in layouts for spec in layout.specs)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def set_dtype(folder: Path, dtype: torch.dtype) -> None:
    """Says in config.json which type the weights now have; leaves the file alone if it says so already."""
    path, name = folder / "config.json", str(dtype).removeprefix("torch.")
    config = json.loads(path.read_text())
    if config.get("dtype", config.get("torch_dtype")) != name:
        config.pop("torch_dtype", None)
        path.write_text(json.dumps({**config, "dtype": name}, indent=2) + "\n")
