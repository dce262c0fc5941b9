"""Hugging Face to Megatron's distributed format and back, tensor by tensor, on any machine.

Neither direction needs a GPU, Megatron or a launcher, and neither holds more than one (fused) tensor and a
buffer. A folder that went to Megatron and comes back is the same, byte for byte: the conversion to Megatron
keeps the headers of the safetensors files and the files beside them.
"""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from copd_megatron.checkpoint.distcp import HashingFile, append, write_metadata
from copd_megatron.formats.megatron_reader import HEADERS, HF_FILES, MegatronFolder, recorded_headers
from copd_megatron.hf.files import (
    INDEX,
    FileLayout,
    SafetensorsReader,
    Spec,
    companions,
    copy_files,
    file_layouts,
    make_layout,
    plan_files,
    set_dtype,
    specs_of_header,
    write_file,
    write_index,
)
from copd_megatron.model.places import MegatronTensor, Place, megatron_tensors, places, stack_sizes
from copd_megatron.model.shape import ModelShape, read_sizes
from copd_megatron.model.slots import as_published

SHARD_BYTES: Final = 4 * 2**30
FILE_BYTES: Final = 4 * 2**30
"""Largest ``.distcp`` file, unless one tensor is larger."""

Progress = Callable[[str, int], None]
"""Called with a tensor's name and the bytes done with it."""


def _silent(name: str, num_bytes: int) -> None:
    """Nobody watches."""


def common_state() -> bytes:
    """What Megatron wants beside the tensors, as ``torch.save`` writes it: there is nothing in it."""
    stream = io.BytesIO()
    torch.save([{}], stream)
    return stream.getvalue()


class TensorTable:
    """What ``.metadata`` says of a model's tensors, told one (layer of a) tensor at a time."""

    def __init__(self, dims: ModelShape) -> None:
        self._dims = dims
        self.described: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}

    def common_state(self) -> MetadataIndex:
        """Takes note of ``common_state()``; by which index it is found."""
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
                "stacked tensors must have one type; convert with --dtype"
            )
        entry.chunks.append(ChunkStorageMetadata(offsets=offset, sizes=shape))
        return MetadataIndex(tensor.key, offset, len(entry.chunks) - 1), shape


# ---- Hugging Face to Megatron ----------------------------------------------------------------------------


def hf_to_megatron(
    source: Path, target: Path, *, dtype: torch.dtype | None = None, progress: Progress = _silent
) -> None:
    """Writes a Hugging Face folder's weights in Megatron's distributed format.

    A Megatron job of any layout loads the result; ``megatron_to_hf`` turns it back.

    Args:
        source: Hugging Face folder of a supported architecture.
        target: must not exist; appears under its name only when it is complete.
        dtype: convert to this type; None: keep each tensor's.

    Raises:
        FileNotFoundError, ValueError: the folder lacks tensors, has more than its config.json says, or holds
            fused tensors of different types.
        FileExistsError: there is something at ``target``.
        OSError: the disk is full; what was written is removed.
    """
    dims = read_sizes(source)
    reader = SafetensorsReader(source)
    _check_tensors(reader, dims, source)
    with _Appearing(target) as partial:
        places_of, described = _write_tensors(reader, dims, partial, dtype, progress)
        write_metadata(partial, Metadata(state_dict_metadata=described), places_of)
        (partial / HF_FILES).mkdir()
        copy_files(companions(source), partial / HF_FILES)
        if (source / INDEX).is_file():
            copy_files([source / INDEX], partial / HF_FILES)
        if dtype is None:
            record = {layout.name: base64.b64encode(layout.header).decode() for layout in reader.layouts}
            (partial / HF_FILES / HEADERS).write_text(json.dumps(record, indent=1))
        else:
            set_dtype(partial / HF_FILES, dtype)


def _check_tensors(reader: SafetensorsReader, dims: ModelShape, source: Path) -> None:
    known, specs = places(dims), reader.specs()
    if missing := sorted(known.keys() - specs.keys()):
        raise ValueError(
            f"{source} lacks {len(missing)} tensors that config.json implies, {missing[0]} for one"
        )
    extra = sorted(specs.keys() - known.keys() - tied_copy(dims).keys())
    if extra:
        raise ValueError(
            f"{source} has {len(extra)} tensors that a {dims.architecture} of config.json's sizes has not, "
            f"{extra[0]} for one"
        )
    for name, parts in known.items():
        if parts[0].stack is not None:
            try:
                as_published(parts[0].stack, lambda name: specs[name].shape)
            except ValueError as error:
                raise ValueError(f"{source}: {error}") from None
        elif specs[name].shape != parts[0].shape:
            raise ValueError(f"{source}: {name} is {specs[name].shape}, config.json implies {parts[0].shape}")
    for tied, original in tied_copy(dims).items():
        if tied in specs and not _equal(reader, tied, original):
            raise ValueError(
                f"{source}: {tied} differs from {original}, but config.json ties them: set "
                "tie_word_embeddings to false there"
            )


def tied_copy(dims: ModelShape) -> dict[str, str]:
    """The output embedding that some folders store though it is tied, and what it is equal to."""
    return (
        {"lm_head.weight": f"{dims.decoder_prefix}.embed_tokens.weight"} if dims.tie_word_embeddings else {}
    )


def _equal(reader: SafetensorsReader, one: str, other: str) -> bool:
    a, b = reader.specs()[one], reader.specs()[other]
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    step, total = 2**20, torch.Size(a.shape).numel()
    for start in range(0, total, step):
        left = torch.empty(min(step, total - start), dtype=a.dtype)
        right = torch.empty_like(left)
        reader.read_into(one, start, left)
        reader.read_into(other, start, right)
        if not torch.equal(left.view(torch.uint8), right.view(torch.uint8)):
            return False
    return True


def _write_tensors(
    reader: SafetensorsReader, dims: ModelShape, folder: Path, dtype: torch.dtype | None, progress: Progress
) -> tuple[list[tuple[MetadataIndex, _StorageInfo]], dict[str, TensorStorageMetadata | BytesStorageMetadata]]:
    """The ``.distcp`` files; where each tensor lies and what it is."""
    table = TensorTable(dims)
    found: list[tuple[MetadataIndex, _StorageInfo]] = []
    number, stream = 0, HashingFile(folder / "__0_0.distcp")
    found.append((table.common_state(), append(stream, io.BytesIO(common_state()), "__0_0.distcp")))
    for tensor in megatron_tensors(dims):
        value = _assemble(reader, tensor, dtype)
        if stream.tell() + value.nbytes > FILE_BYTES and stream.tell():
            stream.finish()
            number += 1
            stream = HashingFile(folder / f"__0_{number}.distcp")
        index, shape = table.add(tensor, value.dtype)
        found.append((index, append(stream, value.view(shape), f"__0_{number}.distcp")))
        progress(tensor.key, value.nbytes)
    stream.finish()
    return found, table.described


def _assemble(reader: SafetensorsReader, tensor: MegatronTensor, dtype: torch.dtype | None) -> Tensor:
    """One Megatron tensor (of one layer) from its Hugging Face parts."""
    specs = reader.specs()
    types = {specs[name].dtype for name, _ in tensor.parts}
    if dtype is None and len(types) > 1:
        raise ValueError(
            f"{', '.join(name for name, _ in tensor.parts)} are one tensor in Megatron but have types "
            f"{', '.join(sorted(map(str, types)))}; convert with --dtype"
        )
    wanted = dtype or next(iter(types))
    out = torch.empty(tensor.shape, dtype=wanted)
    for name, place in tensor.parts:
        if place.stack is not None:
            out.copy_(_expert(reader, name, place))
            continue
        done = 0
        width = torch.Size(place.shape[1:]).numel()
        for start, stop in place.rows:
            target = out[start:stop]
            if specs[name].dtype is wanted:
                reader.read_into(name, done * width, target)
            else:
                piece = torch.empty(target.shape, dtype=specs[name].dtype)
                reader.read_into(name, done * width, piece)
                target.copy_(piece)
            done += stop - start
    return out


def _expert(reader: SafetensorsReader, name: str, place: Place) -> Tensor:
    """One expert of a stack, [outputs, inputs]."""
    assert place.stack is not None
    specs = reader.specs()
    inputs, outputs = place.shape
    if as_published(place.stack, lambda name: specs[name].shape):
        stored = torch.empty(inputs, outputs, dtype=specs[name].dtype)
        reader.read_into(name, place.begin, stored)
        return stored.t()
    stored = torch.empty(outputs, inputs, dtype=specs[name].dtype)
    reader.read_into(name, place.begin, stored)
    return stored


# ---- Megatron to Hugging Face ----------------------------------------------------------------------------


def megatron_to_hf(
    source: Path,
    target: Path,
    *,
    model_path: Path | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = _silent,
) -> None:
    """Writes a checkpoint's weights as a Hugging Face folder, with configuration, tokenizer and processor.

    Tensors are laid out over files as in the folder that the model came from, where that is known.

    Args:
        source: a converted folder, a branch's folder of a joint checkpoint, or a joint checkpoint with one
            trained branch.
        target: must not exist; appears under its name only when it is complete.
        model_path: Hugging Face folder with configuration and tokenizer; None: as the checkpoint knows it.
        dtype: convert to this type; None: keep each tensor's.
        shard_bytes: largest file where no folder gives the layout.

    Raises:
        FileNotFoundError, CheckpointError: the checkpoint is damaged, or its model's folder is gone.
        FileExistsError: there is something at ``target``.
        OSError: the disk is full; what was written is removed.
    """
    dims = read_sizes(model_path) if model_path is not None else None
    tensors = MegatronFolder(source, dims=dims)
    beside = model_path or tensors.companions
    if beside is None:
        raise FileNotFoundError(
            f"{source}: the folder of the model it was trained from is gone; give one with its config.json "
            "and tokenizer (--model)"
        )
    assert tensors.dims is not None
    tied = tied_copy(tensors.dims)
    layouts = _layouts(tensors, beside, dtype, shard_bytes, tied)
    with _Appearing(target) as partial:
        copy_files(companions(beside), partial)
        for layout in layouts:
            write_file(partial / layout.name, layout, lambda spec: _pieces(tensors, spec, tied, progress))
        if (beside / INDEX).is_file() and len(layouts) > 1 and _matches_index(beside / INDEX, layouts):
            copy_files([beside / INDEX], partial)
        else:
            write_index(partial, layouts)
        types = {spec.dtype for layout in layouts for spec in layout.specs}
        if len(types) == 1:
            set_dtype(partial, types.pop())


def _pieces(
    tensors: MegatronFolder, spec: Spec, tied: dict[str, str], progress: Progress
) -> Iterator[Tensor]:
    for piece in tensors.pieces(tied.get(spec.name, spec.name)):
        yield piece.to(spec.dtype)
    progress(spec.name, spec.num_bytes)


def _layouts(
    tensors: MegatronFolder, beside: Path, dtype: torch.dtype | None, shard_bytes: int, tied: dict[str, str]
) -> list[FileLayout]:
    """The safetensors files to write: those of the folder the model came from, in the types it now has."""
    specs = {
        name: Spec(name=name, shape=spec.shape, dtype=dtype or spec.dtype)
        for name, spec in tensors.specs().items()
    }
    record = recorded_headers(tensors.folder)
    template: Iterable[FileLayout] = []
    if record is not None:
        template = [_from_header(name, base64.b64decode(text)) for name, text in record.items()]
    elif any(beside.glob("*.safetensors")):
        template = file_layouts(beside)
    layouts = []
    for layout in template:
        now = tuple(
            # a stack of experts that was not as published will be
            replace(specs[tied.get(s.name, s.name)], name=s.name)
            for s in layout.specs
            if tied.get(s.name, s.name) in specs
        )
        if now == layout.specs:
            layouts.append(layout)
        else:
            told = json.loads(layout.header).get("__metadata__", {"format": "pt"})
            layouts.append(make_layout(layout.name, now, told))
    covered = {spec.name for layout in layouts for spec in layout.specs}
    if covered >= specs.keys():
        return layouts
    return plan_files(list(specs.values()), shard_bytes=shard_bytes)


def _from_header(name: str, header: bytes) -> FileLayout:
    return FileLayout(name=name, header=header, specs=specs_of_header(header))


def _matches_index(path: Path, layouts: list[FileLayout]) -> bool:
    """Whether an index says of these files what is in them."""
    index = json.loads(path.read_text())
    where = {spec.name: layout.name for layout in layouts for spec in layout.specs}
    total = sum(spec.num_bytes for layout in layouts for spec in layout.specs)
    told = index.get("metadata", {}).get("total_size", total)
    return bool(index["weight_map"] == where and told == total)


class _Appearing:
    """A folder that is written under another name and gets its own when it is complete."""

    def __init__(self, target: Path) -> None:
        if target.exists():
            raise FileExistsError(f"{target} exists already; remove it or choose another name")
        self.target, self.partial = target, target.with_name(target.name + ".partial")

    def __enter__(self) -> Path:
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        return self.partial

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.partial.rename(self.target)
        else:
            shutil.rmtree(self.partial, ignore_errors=True)
