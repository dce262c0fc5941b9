"""The tensors of a folder in Megatron's distributed format, under Megatron's names, read by range. Neither
Megatron-Core nor a job is needed.

An item that ``torch.save`` wrote is an uncompressed zip archive, and the tensor's bytes lie in it as they
are: they are read in place, with ``pread``. Memory is what the caller asks for, plus a bounded buffer.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import os
import struct
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from copd_megatron.checkpoint.distcp import METADATA, read_metadata
from copd_megatron.checkpoint.manifest import MANIFEST, CheckpointError, read_manifest
from copd_megatron.hf.folder import read_exactly
from copd_megatron.hf.tensors import bytes_of
from copd_megatron.untrusted.regular_file import FileState, open_regular

_BUFFER_BYTES: Final = 8 * 2**20
_DAMAGE = (
    *(zipfile.BadZipFile, KeyError, NotImplementedError, OverflowError, StopIteration, ValueError),
    struct.error,
)
"""What reading an archive raises that is none."""


@dataclass(frozen=True, kw_only=True)
class MegatronTensorInfo:
    """One tensor of a checkpoint, under Megatron's name."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    num_chunks: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(kw_only=True)
class _Chunk:
    """One saved part of a tensor."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    path: Path
    begin: int
    length: int
    position: int | None = None
    """Where the raw bytes begin in the file, once looked up."""

    def reaches(self, at: tuple[int, ...]) -> bool:
        """Whether it holds some of what lies at an index along the first axes."""
        axes = zip(at, self.offsets, self.sizes, strict=False)
        return all(begin <= place < begin + size for place, begin, size in axes)


@dataclass(frozen=True, kw_only=True)
class _Near:
    """A tensor's chunks by the layer (and expert) that they hold, and those that hold several."""

    by_place: dict[tuple[int, ...], list[_Chunk]]
    others: list[_Chunk]


class MegatronTensors:
    """The tensors of one folder. Safe to use from several threads."""

    def __init__(self, folder: Path) -> None:
        """
        Args:
            folder: holds ``.metadata``.

        Raises:
            FileNotFoundError, CheckpointError: it has no index, or a damaged one.
        """
        self.folder = folder
        metadata = read_metadata(folder)
        self.info = _tensors_of(metadata)
        self._chunks = self._locate(metadata)
        self._near: dict[tuple[str, int], _Near] = {}
        self._states: dict[Path, FileState] = {}

    def _locate(self, metadata: Metadata) -> dict[str, list[_Chunk]]:
        sizes = {
            (key, tuple(chunk.offsets)): tuple(chunk.sizes)
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
            for chunk in entry.chunks
        }
        found: dict[str, list[_Chunk]] = {}
        for index, storage in metadata.storage_data.items():
            if index.fqn not in self.info:
                continue
            offsets = tuple(index.offset or (0,) * len(self.info[index.fqn].shape))
            if (index.fqn, offsets) not in sizes:
                raise CheckpointError(
                    f"{self.folder / METADATA} is damaged: no part of {index.fqn} begins at {offsets}; copy "
                    "the checkpoint again"
                )
            chunk = _Chunk(
                offsets=offsets,
                sizes=sizes[index.fqn, offsets],
                path=self.folder / storage.relative_path,
                begin=storage.offset,
                length=storage.length,
            )
            found.setdefault(index.fqn, []).append(chunk)
        return found

    def identity(self) -> str:
        """Text that changes when the content does."""
        with open_regular(self.folder / METADATA) as file:
            seal = hashlib.sha256(file.read()).hexdigest()[:16]
        files = sorted({chunk.path for chunks in self._chunks.values() for chunk in chunks})
        stats = [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
        return "\n".join([seal, *stats])

    def read_rows(self, key: str, at: tuple[int, ...], start: int, out: Tensor) -> None:
        """Fills ``out`` [rows, width] with rows from ``start`` on of a tensor, or of one layer (and expert)
        of it.

        Args:
            at: index along the first axes: layer, then expert.

        Raises:
            CheckpointError: the checkpoint does not hold them all.
            OSError: a file is truncated, leads out of the folder, has changed meanwhile or cannot be read.
        """
        depth, stop, filled = len(at), start + len(out), 0
        for chunk in self._chunks_at(key, at):
            inside = [i - offset for i, offset in zip(at, chunk.offsets, strict=False)]
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
                f"{self.folder}: {key} has {filled} of {out.numel()} values that {METADATA} promises"
            )

    def _chunks_at(self, key: str, at: tuple[int, ...]) -> list[_Chunk]:
        """The chunks that reach into one layer (and expert). Most hold just one, and a mixture has thousands
        of them, so those are looked up."""
        depth = len(at)
        if (key, depth) not in self._near:
            if not _tile(self.info[key].shape, self._chunks.get(key, [])):
                raise CheckpointError(
                    f"{self.folder / METADATA} is damaged: the parts of {key} overlap or leave a hole; copy "
                    "the checkpoint again"
                )
            near = _Near(by_place={}, others=[])
            for chunk in self._chunks.get(key, []):
                if all(size == 1 for size in chunk.sizes[:depth]):
                    near.by_place.setdefault(chunk.offsets[:depth], []).append(chunk)
                else:
                    near.others.append(chunk)
            self._near[key, depth] = near
        near = self._near[key, depth]
        return near.by_place.get(at, []) + [chunk for chunk in near.others if chunk.reaches(at)]

    def _read_chunk(self, chunk: _Chunk, start: int, target: Tensor) -> None:
        """``target.numel()`` elements of a chunk from ``start`` into a (possibly strided) target."""
        with open_regular(
            chunk.path, inside=self.folder, as_of=self._states.get(chunk.path), buffered=False
        ) as file:
            self._states.setdefault(chunk.path, FileState.of(file.fileno()))
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
            where = f"{chunk.path}, byte {chunk.begin}"
            try:
                position, num_bytes = _stored_values(descriptor, chunk.begin, chunk.length)
            except _DAMAGE as error:
                raise CheckpointError(
                    f"{where}: no tensor as torch.save writes it ({error!r}): the file is damaged"
                ) from error
            if num_bytes != math.prod(chunk.sizes) * dtype.itemsize:
                raise CheckpointError(
                    f"{where}: a tensor of {num_bytes} bytes where {chunk.sizes} of {dtype} should be"
                )
            chunk.position = position
        return chunk.position


def _tile(shape: tuple[int, ...], chunks: Sequence[_Chunk]) -> bool:
    """Whether chunks fill a tensor, every element once. Corners of boxes, counted with alternating signs,
    cancel where boxes meet; those of the whole are left exactly if the boxes tile it."""
    left: Counter[tuple[int, ...]] = Counter()
    boxes = [((0,) * len(shape), shape, -1), *((chunk.offsets, chunk.sizes, 1) for chunk in chunks)]
    for offsets, sizes, sign in boxes:
        for upper in itertools.product((False, True), repeat=len(shape)):
            corner = tuple(o + s * u for o, s, u in zip(offsets, sizes, upper, strict=True))
            left[corner] += -sign if sum(upper) % 2 else sign
    return not any(left.values())


_MAX_DIRECTORY_BYTES: Final = 1 << 20
"""Of the archive of one tensor, whose directory has a few entries. The values are not read through it."""


class _Window(io.RawIOBase):
    """A range of a file as a file, of which only small parts are read."""

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
        if size > _MAX_DIRECTORY_BYTES:
            raise ValueError(f"its archive's directory claims {size} bytes")
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


def _tensors_of(metadata: Metadata) -> dict[str, MegatronTensorInfo]:
    return {
        key: MegatronTensorInfo(
            shape=tuple(value.size), dtype=value.properties.dtype, num_chunks=len(value.chunks)
        )
        for key, value in metadata.state_dict_metadata.items()
        if isinstance(value, TensorStorageMetadata)
    }


def megatron_tensors_of(folder: Path) -> dict[str, MegatronTensorInfo]:
    """Every tensor of a folder under Megatron's name, the optimizer's too.

    Raises:
        FileNotFoundError, CheckpointError: there is no such checkpoint, or its index is damaged.
    """
    return _tensors_of(read_metadata(folder))


def storage_problems(folder: Path) -> list[str]:
    """Files that a folder's index names and that are missing, too short, no files, or links out of it.

    Raises:
        FileNotFoundError, CheckpointError: as ``megatron_tensors_of``.
    """
    ends: dict[str, int] = {}
    for place in read_metadata(folder).storage_data.values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    found = []
    for name, end in sorted(ends.items()):
        path = folder / name
        try:
            with open_regular(path, inside=folder, buffered=False) as file:
                num_bytes = FileState.of(file.fileno()).num_bytes
        except FileNotFoundError:
            found.append(f"{path} is missing")
        except OSError as error:
            found.append(f"{path} {error.strerror}")
        else:
            if num_bytes < end:
                found.append(f"{path} has {num_bytes} bytes, its index needs {end}")
    return found


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
