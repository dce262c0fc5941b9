"""Megatron's distributed format as a sink of Hugging Face tensors.

A Hugging Face tensor is some rows of (a layer of) a Megatron tensor (``model.places``), so a merge of any
formats into any format goes block by block, straight from file to file.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from copd_megatron.checkpoint.distcp import write_metadata
from copd_megatron.formats.megatron_source import HF_FILES
from copd_megatron.hf.planned_file import Extent, PlannedFile, PlannedFileWriter
from copd_megatron.hf.template import Template
from copd_megatron.hf.tensors import TensorSpec, cut
from copd_megatron.model.places import MegatronTensor, TensorPlace, megatron_tensors, places, stack_sizes
from copd_megatron.model.shape import ModelShape
from copd_megatron.model.slots import tied_copy


class MegatronSink:
    """A folder in Megatron's distributed format, one ``.distcp`` file per shard. Jobs of any layout load it.

    The checksums inside the archives around tensors are 0: nothing that loads checkpoints looks at them, and
    they would take a second pass.

    Args:
        folder: exists; several processes may write different shards of it.
        dims: the model's sizes.
        specs: all tensors under Hugging Face names, every expert's by itself.
        shard_bytes: largest file, unless a single (fused) tensor is larger.
        label: what messages call the tensors' origin.
        template: kept in the folder, so that a conversion back gives the same files.
        fsync: a shard is closed only when the disk has it.

    Raises:
        ValueError: the tensors are not those of a model of these sizes, or parts of one Megatron tensor
            differ in type.
    """

    def __init__(
        self,
        folder: Path,
        dims: ModelShape,
        specs: Sequence[TensorSpec],
        shard_bytes: int,
        *,
        label: str,
        template: Template | None = None,
        fsync: bool = False,
    ) -> None:
        self.folder, self._template, self._fsync = folder, template, fsync
        self._specs = {spec.name: spec for spec in specs}
        _check_names(self._specs, dims, label)
        table = _Table(dims)
        frame = _common_state()
        first = _Item(index=table.common_state(), begin=0, length=len(frame))
        self._files: list[_File] = []
        groups = cut(megatron_tensors(dims), shard_bytes, self._num_bytes)
        for number, group in enumerate(groups):
            file = _File(name=f"__0_{number}.distcp")
            if not number:
                file.frame.append((0, frame))
                file.items.append(first)
            for tensor in group:
                self._lay(file, tensor, table)
            self._files.append(file)
        self._described = table.described

    @property
    def shards(self) -> Sequence[Sequence[TensorSpec]]:
        return [[self._specs[name] for name in file.where] for file in self._files]

    @property
    def companions(self) -> Path:
        return self.folder / HF_FILES

    def open(self, index: int) -> PlannedFileWriter:
        return PlannedFileWriter(self._plan(index), fsync=self._fsync)

    def digest(self, index: int) -> str | None:
        return self._plan(index).digest()

    def finish(self) -> None:
        if self._template is not None:
            self._template.write_record(self.companions)
        found = [
            (item.index, _StorageInfo(file.name, item.begin, item.length))
            for file in self._files
            for item in file.items
        ]
        write_metadata(self.folder, Metadata(state_dict_metadata=self._described), found)

    def _num_bytes(self, tensor: MegatronTensor) -> int:
        return sum(self._specs[name].num_bytes for name, _ in tensor.parts)

    def _lay(self, file: _File, tensor: MegatronTensor, table: _Table) -> None:
        """Gives a tensor its place behind what is in the file already."""
        types = {self._specs[name].dtype for name, _ in tensor.parts}
        if len(types) > 1:
            raise ValueError(
                f"{', '.join(name for name, _ in tensor.parts)} are one tensor in Megatron but have types "
                f"{', '.join(sorted(map(str, types)))}; choose one (--out-dtype of copd merge, --dtype of a "
                "conversion)"
            )
        index, shape = table.add(tensor, types.pop())
        archive = _archive(shape, self._specs[tensor.parts[0][0]].dtype)
        begin = file.num_bytes
        file.items.append(_Item(index=index, begin=begin, length=archive.num_bytes))
        file.frame.extend((begin + position, data) for position, data in archive.frame)
        for name, place in tensor.parts:
            file.where[name] = (begin + archive.values_begin, place)

    def _plan(self, index: int) -> PlannedFile:
        file = self._files[index]

        def extents(name: str, start: int, stop: int) -> list[Extent]:
            begin, place = file.where[name]
            spec, found, done = self._specs[name], [], 0
            width = torch.Size(spec.shape[1:]).numel()
            for first, last in place.rows:
                low, high = max(start, done), min(stop, done + (last - first) * width)
                if low < high:
                    inside = first * width + low - done
                    found.append((begin + inside * spec.dtype.itemsize, (high - low) * spec.dtype.itemsize))
                done += (last - first) * width
            return found

        return PlannedFile(
            path=self.folder / file.name,
            frame=tuple(file.frame),
            specs=tuple(self._specs[name] for name in file.where),
            extents=extents,
            num_bytes=file.num_bytes,
        )


def _check_names(specs: Mapping[str, TensorSpec], dims: ModelShape, label: str) -> None:
    """Refuses tensors that are not those of a model of these sizes."""
    wanted = places(dims)
    extra = sorted(specs.keys() - wanted.keys() - tied_copy(dims).keys())
    missing = sorted(wanted.keys() - specs.keys())
    if extra or missing:
        raise ValueError(
            f"{label} "
            + (f"lacks {len(missing)} tensors" if missing else f"has {len(extra)} tensors too many")
            + f" for a {dims.architecture} of the sizes in config.json, {(missing or extra)[0]} for one; "
            "Megatron's format holds no other models"
        )
    for name, place in wanted.items():
        if specs[name].shape != place.shape:
            raise ValueError(f"{label}: {name} is {specs[name].shape}, config.json implies {place.shape}")


class _Table:
    """What ``.metadata`` says of a model's tensors, told one (layer of a) tensor at a time."""

    def __init__(self, dims: ModelShape) -> None:
        self._dims = dims
        self.described: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}

    def common_state(self) -> MetadataIndex:
        """Takes note of ``_common_state()``; by which index it is found."""
        key = "common_state/shard_0_1"
        self.described[key] = BytesStorageMetadata()
        return MetadataIndex(key)

    def add(self, tensor: MegatronTensor, dtype: torch.dtype) -> tuple[MetadataIndex, torch.Size]:
        """Takes note of a tensor.

        Returns:
            By which index it is found, and the shape it is stored in: layers and experts have axes of their
            own.

        Raises:
            ValueError: it belongs to a stack of another type.
        """
        stacked = stack_sizes(self._dims, tensor.key)
        shape = torch.Size((*(1 for _ in stacked), *tensor.shape))
        whole = torch.Size((*stacked, *tensor.shape))
        offset = torch.Size((*tensor.at, *(0 for _ in tensor.shape)))
        entry = self.described.setdefault(
            tensor.key,
            TensorStorageMetadata(properties=TensorProperties(dtype=dtype), size=whole, chunks=[]),
        )
        assert isinstance(entry, TensorStorageMetadata)
        if entry.properties.dtype is not dtype:
            raise ValueError(
                f"layer {tensor.at[0]} of {tensor.key} is {dtype}, another {entry.properties.dtype}: "
                "stacked tensors must have one type; choose one (--out-dtype of copd merge, --dtype of a "
                "conversion)"
            )
        entry.chunks.append(ChunkStorageMetadata(offsets=offset, sizes=shape))
        return MetadataIndex(tensor.key, offset, len(entry.chunks) - 1), shape


def _common_state() -> bytes:
    """What Megatron wants beside the tensors, as ``torch.save`` writes it: there is nothing in it."""
    stream = io.BytesIO()
    torch.save([{}], stream)
    return stream.getvalue()


@dataclass(frozen=True, kw_only=True)
class _Item:
    """One archive in a file."""

    index: MetadataIndex
    begin: int
    length: int


@dataclass(kw_only=True)
class _File:
    """One ``.distcp`` file as it will be."""

    name: str
    frame: list[tuple[int, bytes]] = field(default_factory=list)
    """What is not values: position and bytes."""
    items: list[_Item] = field(default_factory=list)
    where: dict[str, tuple[int, TensorPlace]] = field(default_factory=dict)
    """Hugging Face name to where the Megatron tensor's values begin, and its rows of it."""

    @property
    def num_bytes(self) -> int:
        return self.items[-1].begin + self.items[-1].length if self.items else 0


@dataclass(frozen=True, kw_only=True)
class _Archive:
    """What ``torch.save`` writes around one tensor's values."""

    frame: tuple[tuple[int, bytes], ...]
    values_begin: int
    num_bytes: int


@cache
def _archive(shape: torch.Size, dtype: torch.dtype) -> _Archive:
    recorder = _Recorder()
    with torch.serialization.skip_data():
        torch.save(torch.empty(shape, dtype=dtype), cast(IO[bytes], recorder))  # its memory is never touched
    assert recorder.hole is not None
    return _Archive(frame=tuple(recorder.pieces), values_begin=recorder.hole, num_bytes=recorder.tell())


class _Recorder(io.RawIOBase):
    """A file that remembers what is written, and where a gap is left for values."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[tuple[int, bytes]] = []
        self.hole: int | None = None
        self._place = 0

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        assert whence == os.SEEK_CUR and self.hole is None
        self.hole, self._place = self._place, self._place + offset
        return self._place

    def write(self, data: Any) -> int:
        piece = bytes(data)
        self.pieces.append((self._place, piece))
        self._place += len(piece)
        return len(piece)
