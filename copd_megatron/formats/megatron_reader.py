"""A folder in Megatron's distributed format as a source of Hugging Face tensors. Neither Megatron nor a job.

Reads by range with ``pread``: an item that ``torch.save`` wrote is an uncompressed zip archive, and the
tensor's bytes lie in it as they are. Memory is what the caller asks for, plus a bounded buffer.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from copd_megatron.checkpoint.distcp import METADATA
from copd_megatron.checkpoint.manifest import MANIFEST, CheckpointError, read_manifest
from copd_megatron.hf.files import Spec, bytes_of, read_exactly
from copd_megatron.model.places import Place, full_shape, places, shape_from_record
from copd_megatron.model.shape import ModelShape, read_sizes

HF_FILES: Final = "hf"
"""Folder in a converted checkpoint with the Hugging Face folder's other files."""
HEADERS: Final = "safetensors.headers"
"""In it, the headers of its safetensors files."""
_BUFFER_BYTES = 8 * 2**20


@dataclass(kw_only=True)
class _Chunk:
    """One saved part of a Megatron tensor."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    path: Path
    begin: int
    length: int
    position: int | None = None
    """Where the raw bytes begin in the file, once looked up."""


@dataclass(kw_only=True)
class MegatronTensorInfo:
    """One tensor of a checkpoint, under Megatron's name."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    num_chunks: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class MegatronFolder:
    """A branch's folder of a joint checkpoint, or a converted one. Safe to use from several threads."""

    def __init__(self, folder: str | Path, *, dims: ModelShape | None = None) -> None:
        """
        Args:
            folder: holds ``.metadata``; a checkpoint's own folder is taken for its only trained branch.
            dims: sizes of the model; None: as the manifest or the converted configuration says.

        Raises:
            FileNotFoundError: no such checkpoint.
            CheckpointError: it is damaged, has several branches, or does not say what model it holds.
        """
        self.folder = find_folder(Path(folder))
        self.label = str(self.folder)
        metadata = _read_metadata(self.folder)
        self._tensors = {
            key: value
            for key, value in metadata.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata)
        }
        self._chunks = self._locate(metadata)
        found, self.companions = _model_of(self.folder)
        self.dims = dims or found
        if self.dims is None:
            raise CheckpointError(
                f"{self.folder} does not say what model it holds: neither {MANIFEST} in the folder above nor "
                f"{HF_FILES}/config.json in it; give the Hugging Face folder that the model came from"
            )
        self._places = places(self.dims)
        missing = [name for name, parts in self._places.items() if parts[0].key not in self._tensors]
        if missing:
            raise CheckpointError(
                f"{self.folder} lacks {len(missing)} of {len(self._places)} tensors, {missing[0]} for one: "
                "it holds another architecture"
            )

    def _locate(self, metadata: Metadata) -> dict[str, list[_Chunk]]:
        chunks: dict[str, list[_Chunk]] = {}
        for index, storage in metadata.storage_data.items():
            tensor = self._tensors.get(index.fqn)
            if tensor is None:
                continue
            offsets = tuple(index.offset or (0,) * len(tensor.size))
            sizes = next(tuple(c.sizes) for c in tensor.chunks if tuple(c.offsets) == offsets)
            chunks.setdefault(index.fqn, []).append(
                _Chunk(
                    offsets=offsets,
                    sizes=sizes,
                    path=self.folder / storage.relative_path,
                    begin=storage.offset,
                    length=storage.length,
                )
            )
        return chunks

    # ---- Hugging Face names --------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """Hugging Face tensor names, sorted."""
        return sorted(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises KeyError when there is no such tensor."""
        return full_shape(self._places[name])

    def dtype(self, name: str) -> torch.dtype:
        """Raises KeyError when there is no such tensor."""
        dtype: torch.dtype = self._tensors[self._places[name][0].key].properties.dtype
        return dtype

    def specs(self) -> dict[str, Spec]:
        """All Hugging Face tensors, in forward order."""
        return {n: Spec(name=n, shape=self.shape(n), dtype=self.dtype(n)) for n in self._places}

    def read(self, name: str) -> Tensor:
        """A whole tensor."""
        out = torch.empty(self.shape(name), dtype=self.dtype(name))
        self.read_into(name, 0, out.view(-1))
        return out

    def pieces(self, name: str, num_bytes: int = _BUFFER_BYTES) -> Iterator[Tensor]:
        """A tensor's values in order, flat, at most ``num_bytes`` at a time."""
        dtype, total = self.dtype(name), math.prod(self.shape(name))
        step = max(num_bytes // dtype.itemsize, 1)
        for start in range(0, total, step):
            out = torch.empty(min(step, total - start), dtype=dtype)
            self.read_into(name, start, out)
            yield out

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Fills ``out`` (1-D, contiguous, of the tensor's type) with elements [start, start + len(out)).

        Raises:
            KeyError: no such tensor.
            OSError: a file is truncated or cannot be read.
        """
        parts = self._places[name]
        if parts[0].stack is None:
            self._read_plain(parts[0], start, out)
            return
        size = math.prod(parts[0].shape)
        for place in parts:
            low, high = max(start, place.begin), min(start + out.numel(), place.begin + size)
            if low < high:  # whole experts, since they lie transposed
                inputs, outputs = place.shape
                expert = torch.empty(outputs, inputs, dtype=out.dtype)
                self._read_rows(place, 0, outputs, expert)
                out[low - start : high - start] = expert.t().reshape(-1)[
                    low - place.begin : high - place.begin
                ]

    def _read_plain(self, place: Place, start: int, out: Tensor) -> None:
        width = max(math.prod(place.shape[1:]), 1)
        stop = start + out.numel()
        first, last = start // width, -(-stop // width)
        if start % width == 0 and stop % width == 0:
            self._read_rows(place, first, last, out.view(last - first, width))
            return
        rows = torch.empty(last - first, width, dtype=out.dtype)
        self._read_rows(place, first, last, rows)
        out.copy_(rows.view(-1)[start - first * width : stop - first * width])

    def identity(self) -> str:
        """Text that changes when the content does."""
        seal = hashlib.sha256((self.folder / METADATA).read_bytes()).hexdigest()[:16]
        files = sorted({chunk.path for chunks in self._chunks.values() for chunk in chunks})
        stats = [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
        return "\n".join([seal, *stats])

    # ---- reading -------------------------------------------------------------------------------------------

    def _read_rows(self, place: Place, first: int, last: int, out: Tensor) -> None:
        """Rows [first, last) of a Hugging Face tensor into ``out`` [last - first, width]."""
        done = 0
        for start, stop in place.rows_between(first, last):
            self._read_box(place, start, stop, out[done : done + stop - start])
            done += stop - start

    def _read_box(self, place: Place, start: int, stop: int, out: Tensor) -> None:
        """Rows [start, stop) of the (layer of the) Megatron tensor, from the chunks that hold them."""
        depth = len(place.at)
        filled = 0
        for chunk in self._chunks[place.key]:
            inside = [at - offset for at, offset in zip(place.at, chunk.offsets, strict=False)]
            if any(not 0 <= i < size for i, size in zip(inside, chunk.sizes, strict=False)):
                continue
            skipped = sum(i * math.prod(chunk.sizes[axis + 1 :]) for axis, i in enumerate(inside))
            offsets, sizes = chunk.offsets[depth:], chunk.sizes[depth:]
            low, high = max(start, offsets[0]), min(stop, offsets[0] + sizes[0])
            if low >= high:
                continue
            columns = math.prod(sizes[1:])
            column = offsets[1] if len(sizes) == 2 else 0
            target = out[low - start : high - start, column : column + columns]
            self._read_chunk(chunk, skipped + (low - offsets[0]) * columns, target)
            filled += target.numel()
        if filled != out.numel():
            raise CheckpointError(
                f"{self.folder}: {place.key} has {filled} of {out.numel()} values that {METADATA} promises"
            )

    def _read_chunk(self, chunk: _Chunk, start: int, target: Tensor) -> None:
        """``target.numel()`` elements of a chunk from ``start`` into a (possibly strided) target."""
        with chunk.path.open("rb", buffering=0) as file:
            position = self._position(chunk, file.fileno(), target.dtype)
            begin = position + start * target.dtype.itemsize
            if target.is_contiguous():
                read_exactly(file.fileno(), bytes_of(target), begin, chunk.path)
                return
            rows, columns = target.shape
            step = max(_BUFFER_BYTES // (columns * target.dtype.itemsize), 1)
            for row in range(0, rows, step):
                piece = torch.empty(min(step, rows - row), columns, dtype=target.dtype)
                where = begin + row * columns * target.dtype.itemsize
                read_exactly(file.fileno(), bytes_of(piece), where, chunk.path)
                target[row : row + len(piece)] = piece

    def _position(self, chunk: _Chunk, descriptor: int, dtype: torch.dtype) -> int:
        """Where in the file the chunk's values begin."""
        if chunk.position is None:
            try:
                position, num_bytes = _stored_values(descriptor, chunk.begin, chunk.length)
            except (zipfile.BadZipFile, KeyError, StopIteration, ValueError) as error:
                raise CheckpointError(
                    f"{chunk.path}, byte {chunk.begin}: no tensor as torch.save writes it ({error!r}): the "
                    "file is damaged"
                ) from error
            if num_bytes != math.prod(chunk.sizes) * dtype.itemsize:
                raise CheckpointError(
                    f"{chunk.path}, byte {chunk.begin}: a tensor of {num_bytes} bytes where {chunk.sizes} of "
                    f"{dtype} should be"
                )
            chunk.position = position
        return chunk.position


class _Window(io.RawIOBase):
    """A range of a file as a file."""

    def __init__(self, descriptor: int, begin: int, length: int) -> None:
        super().__init__()
        self._descriptor, self._begin, self._length, self._place = descriptor, begin, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._length}[whence]
        self._place = origin + offset
        return self._place

    def tell(self) -> int:
        return self._place

    def read(self, size: int = -1) -> bytes:
        left = self._length - self._place
        size = left if size < 0 else min(size, left)
        data = os.pread(self._descriptor, max(size, 0), self._begin + self._place)
        self._place += len(data)
        return data


def _stored_values(descriptor: int, begin: int, length: int) -> tuple[int, int]:
    """(position in the file, bytes) of the values in one ``torch.save`` archive that holds one tensor."""
    with zipfile.ZipFile(_Window(descriptor, begin, length)) as archive:
        entry = next(info for info in archive.infolist() if info.filename.endswith("/data/0"))
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError("compressed")
    header = begin + entry.header_offset
    fixed = os.pread(descriptor, 30, header)
    name, extra = int.from_bytes(fixed[26:28], "little"), int.from_bytes(fixed[28:30], "little")
    return header + 30 + name + extra, entry.file_size


def megatron_tensors_of(folder: Path) -> dict[str, MegatronTensorInfo]:
    """Every tensor of a folder under Megatron's name, the optimizer's too.

    Raises:
        FileNotFoundError, CheckpointError: there is no such checkpoint, or its metadata is damaged.
    """
    return {
        key: MegatronTensorInfo(
            shape=tuple(value.size), dtype=value.properties.dtype, num_chunks=len(value.chunks)
        )
        for key, value in _read_metadata(folder).state_dict_metadata.items()
        if isinstance(value, TensorStorageMetadata)
    }


# ---- finding ---------------------------------------------------------------------------------------------


def find_folder(path: Path, branch: str | None = None) -> Path:
    """The folder with ``.metadata``: ``path`` itself, or a branch's in a joint checkpoint.

    Raises:
        FileNotFoundError, CheckpointError: there is none, or several and no ``branch`` to choose by.
    """
    if (path / METADATA).is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist; give a branch's folder of a checkpoint")
    if not (path / MANIFEST).is_file():
        raise CheckpointError(
            f"{path} holds neither {METADATA} nor {MANIFEST}: it is no checkpoint in Megatron's format, or "
            "the save was not finished"
        )
    trained = [name for name, entry in read_manifest(path).branches.items() if not entry.frozen]
    wanted = branch or (trained[0] if len(trained) == 1 else None)
    if wanted not in trained:
        raise CheckpointError(
            f"{path} holds the branches {', '.join(trained)}: name one, {path}/{trained[0]}"
        )
    return path / wanted


def _read_metadata(folder: Path) -> Metadata:
    try:
        with (folder / METADATA).open("rb") as file:
            metadata: Metadata = pickle.load(file)
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError) as error:
        raise CheckpointError(f"{folder / METADATA} is damaged: {error}") from error
    return metadata


def _model_of(folder: Path) -> tuple[ModelShape | None, Path | None]:
    """Sizes of the model, and a folder with its configuration and tokenizer, as far as the checkpoint
    knows."""
    if (folder / HF_FILES / "config.json").is_file():
        return read_sizes(folder / HF_FILES), folder / HF_FILES
    if (folder.parent / MANIFEST).is_file():
        entry = read_manifest(folder.parent).branches.get(folder.name)
        if entry is not None:
            source = Path(entry.model_path)
            return shape_from_record(entry.dims), source if source.is_dir() else None
    return None, None


def recorded_headers(folder: Path) -> Mapping[str, str] | None:
    """Headers of the safetensors files that a converted folder came from, by file name, in base 64."""
    path = folder / HF_FILES / HEADERS
    if not path.is_file():
        return None
    record: dict[str, str] = json.loads(path.read_text())
    return record
