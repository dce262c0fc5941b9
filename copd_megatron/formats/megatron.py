"""Megatron's distributed format as merge source and sink: branches of joint checkpoints, converted folders.

Both sides work under Hugging Face names: a Hugging Face tensor is some rows of (a layer of) a Megatron tensor
(``checkpoint.hf_names``), so a merge of any formats into any format goes block by block, straight from file
to file.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from copd_megatron.checkpoint.distcp import write_metadata
from copd_megatron.checkpoint.manifest import (
    MANIFEST,
    CheckpointError,
    Manifest,
    hash_problems,
    read_manifest,
    size_problems,
)
from copd_megatron.formats.convert import TensorTable, common_state, tied_copy
from copd_megatron.formats.megatron_reader import HF_FILES, MegatronFolder, recorded_headers
from copd_megatron.formats.planned_file import Extent, PlannedFile, PlannedFileWriter
from copd_megatron.formats.tensors import TensorSpec, cut
from copd_megatron.hf.files import file_layouts, specs_of_header
from copd_megatron.model.places import MegatronTensor, Place, full_shape, megatron_tensors, places
from copd_megatron.model.shape import ModelShape


class MegatronSource:
    """A branch's folder under Hugging Face names, read range by range; safe for several threads."""

    def __init__(self, folder: Path) -> None:
        """
        Args:
            folder: a branch's folder of a joint checkpoint, a converted folder, or a joint checkpoint with
                one trained branch.

        Raises:
            CheckpointError: it is damaged or unfinished, has several branches, or does not say what model
                it holds.
        """
        self._folder = MegatronFolder(folder)
        self.label = self._folder.label
        self.companions: Path | None = self._folder.companions
        self.dims: ModelShape | None = self._folder.dims
        self._manifest = _manifest_of(self._folder.folder)
        if self._manifest and (problems := size_problems(self._folder.folder.parent, self._manifest)):
            raise CheckpointError(f"merge: {'; '.join(problems)}; merge an older checkpoint")
        self._alias = self._stored_copies()

    def names(self) -> Sequence[str]:
        return sorted([*self._folder.names(), *self._alias])

    def spec(self, name: str) -> TensorSpec:
        original = self._alias.get(name, name)
        return TensorSpec(name, self._folder.shape(original), self._folder.dtype(original))

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        self._folder.read_into(self._alias.get(name, name), start, out)

    def identity(self) -> str:
        return self._folder.identity()

    def problems(self) -> list[str]:
        return hash_problems(self._folder.folder.parent, self._manifest) if self._manifest else []

    def _stored_copies(self) -> dict[str, str]:
        """Tied tensors that Megatron keeps once but the model's Hugging Face folder stores twice: the copy,
        and what it is a copy of."""
        assert self.dims is not None
        tied = tied_copy(self.dims)
        record = recorded_headers(self._folder.folder)
        stored: set[str] = set()
        if tied and record is not None:
            headers = [base64.b64decode(text) for text in record.values()]
            stored = {spec.name for header in headers for spec in specs_of_header(header)}
        elif tied and self.companions is not None and any(self.companions.glob("*.safetensors")):
            stored = {spec.name for layout in file_layouts(self.companions) for spec in layout.specs}
        return {name: original for name, original in tied.items() if name in stored}


def _manifest_of(folder: Path) -> Manifest | None:
    """The joint checkpoint's manifest, cut down to this branch; None for a converted folder."""
    if not (folder.parent / MANIFEST).is_file():
        return None
    manifest = read_manifest(folder.parent)
    branches = {name: entry for name, entry in manifest.branches.items() if name == folder.name}
    return replace(manifest, branches=branches)


# ---- writing ---------------------------------------------------------------------------------------------


class MegatronSink:
    """A folder in Megatron's distributed format, one ``.distcp`` file per shard; as
    ``tools/convert_hf_to_megatron.py`` writes it, but for the checksums inside the archives around tensors,
    which are 0: nothing that loads checkpoints looks at them, and they would take a second pass.

    Args:
        folder: exists; several processes may write different shards of it.
        dims: the model's sizes.
        specs: all tensors under Hugging Face names.
        shard_bytes: largest file, unless a single (fused) tensor is larger.
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
        fsync: bool = False,
    ) -> None:
        self.folder, self._fsync = folder, fsync
        self._specs = {spec.name: spec for spec in specs}
        _check_names(self._specs, dims)
        table = TensorTable(dims)
        frame = common_state()
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
        found = [
            (item.index, _StorageInfo(file.name, item.begin, item.length))
            for file in self._files
            for item in file.items
        ]
        write_metadata(self.folder, Metadata(state_dict_metadata=self._described), found)

    def _num_bytes(self, tensor: MegatronTensor) -> int:
        return sum(self._specs[name].num_bytes for name, _ in tensor.parts)

    def _lay(self, file: _File, tensor: MegatronTensor, table: TensorTable) -> None:
        """Gives a tensor its place behind what is in the file already."""
        types = {self._specs[name].dtype for name, _ in tensor.parts}
        if len(types) > 1:
            raise ValueError(
                f"merge: {', '.join(name for name, _ in tensor.parts)} are one tensor in Megatron but have "
                f"types {', '.join(sorted(map(str, types)))}; give --out-dtype"
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
    where: dict[str, tuple[int, Place]] = field(default_factory=dict)
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


def _check_names(specs: Mapping[str, TensorSpec], dims: ModelShape) -> None:
    if dims.stacks_experts:
        raise ValueError(
            f"merge: a {dims.architecture} cannot be written in Megatron's format straight away, since its "
            "experts lie transposed there: write Hugging Face's (--format hf), then "
            "tools/convert_hf_to_megatron.py"
        )
    wanted = {name: full_shape(parts) for name, parts in places(dims).items()}
    extra = sorted(specs.keys() - wanted.keys() - tied_copy(dims).keys())
    missing = sorted(wanted.keys() - specs.keys())
    if extra or missing:
        what = "lacks" if missing else "has, beyond it,"
        raise ValueError(
            f"merge: Megatron's format needs the tensors of a {dims.architecture} of config.json's sizes; "
            f"the result {what} {(missing or extra)[0]} and {len(missing or extra) - 1} more; write Hugging "
            "Face's format (--format hf)"
        )
    for name, shape in wanted.items():
        if specs[name].shape != shape:
            raise ValueError(f"merge: {name} is {specs[name].shape}, config.json implies {shape}")
