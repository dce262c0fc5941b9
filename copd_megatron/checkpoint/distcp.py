"""Files of ``torch.distributed.checkpoint``, which Megatron's distributed format is made of. Torch only.

A ``.distcp`` file is a sequence of items, each as ``torch.save`` writes it; ``.metadata``, a pickle, is the
index: which part of which tensor lies where. Both are read without running anything that they ask for.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, Final, cast

import torch
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)

from copd_megatron.checkpoint.manifest import CheckpointError, FileEntry, hash_file
from copd_megatron.checkpoint.safe_pickle import check_saved, load_metadata
from copd_megatron.untrusted.regular_file import open_regular
from copd_megatron.untrusted.whole_file import sync_folder

METADATA: Final = ".metadata"
BACKEND: Final = "metadata.json"
"""What Megatron knows its format by."""


class HashingFile(io.RawIOBase):
    """An append-only file that hashes what is written to it.

    After a failed write it ignores the rest, because ``torch.save`` reacts to an exception by writing again.
    ``finish`` raises the first error.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = path.open("wb", buffering=0)
        self._digest = hashlib.sha256()
        self._size = 0
        self._error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        """Appends bytes; after a failure does nothing."""
        view = memoryview(data).cast("B")
        left = view
        try:
            while self._error is None and len(left):
                left = left[self._file.write(left) :]
        except OSError as error:
            self._error = error
        if self._error is None:
            self._digest.update(view)
        self._size += view.nbytes
        return view.nbytes

    def tell(self) -> int:
        return self._size

    @property
    def failed(self) -> bool:
        """Whether a write has failed."""
        return self._error is not None

    def finish(self) -> tuple[int, str]:
        """Syncs the file to the disk and closes it; returns size and SHA-256.

        Raises:
            OSError: a write failed, now or before.
        """
        try:
            if self._error is not None:
                raise self._error
            os.fsync(self._file.fileno())
        finally:
            self._file.close()
        return self._size, self._digest.hexdigest()


def append(stream: HashingFile, data: Any, name: str) -> _StorageInfo:
    """Appends one item (a tensor or a ``BytesIO``) to the file called ``name``; returns its place."""
    begin = stream.tell()
    if isinstance(data, io.BytesIO):
        stream.write(data.getbuffer())
    else:
        torch.save(own_storage(data.detach().cpu()), cast(IO[bytes], stream))
    return _StorageInfo(name, begin, stream.tell() - begin)


def own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in a storage of its own, since ``torch.save`` writes whole storages."""
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole and tensor.is_contiguous() else tensor.clone(memory_format=torch.contiguous_format)


def write_metadata(
    folder: Path, metadata: Metadata, places: Iterable[tuple[MetadataIndex, _StorageInfo]]
) -> list[FileEntry]:
    """Writes ``.metadata`` and ``metadata.json``, which make a folder with ``.distcp`` files readable.

    Raises:
        OSError: the disk is full.
    """
    # not Megatron's subclass, so that reading needs torch only
    plain = Metadata(
        state_dict_metadata=metadata.state_dict_metadata,
        storage_data=dict(places),
        storage_meta=StorageMeta(),
        version=CURRENT_DCP_VERSION,
    )
    with (folder / METADATA).open("wb") as file:
        pickle.dump(plain, file)
        file.flush()
        os.fsync(file.fileno())
    with (folder / BACKEND).open("w") as text:
        json.dump({"sharded_backend": "torch_dist", "sharded_backend_version": 1}, text, allow_nan=False)
        text.flush()
        os.fsync(text.fileno())
    sync_folder(folder)
    return [
        FileEntry(
            path=f"{folder.name}/{name}",
            num_bytes=(folder / name).stat().st_size,
            sha256=hash_file(folder / name),
        )
        for name in (METADATA, BACKEND)
    ]


# ---- reading ---------------------------------------------------------------------------------------------


def read_metadata(folder: Path) -> Metadata:
    """A folder's index, with all fields of the right type.

    Raises:
        FileNotFoundError: the folder has none.
        CheckpointError: it is damaged, asks for names that no index needs, or names files outside the folder.
    """
    path = folder / METADATA
    found = load_metadata(path)
    try:
        problem = _problem_of(found)
    except (AttributeError, TypeError) as error:
        problem = repr(error)
    if problem is not None:
        raise CheckpointError(f"{path} is damaged: {problem}; copy the checkpoint again")
    assert isinstance(found, Metadata)
    return found


def _problem_of(found: Any) -> str | None:
    """What is wrong with an index; None: nothing."""
    if not isinstance(found, Metadata):
        return f"it holds a {type(found).__name__}"
    if not isinstance(found.state_dict_metadata, dict) or not isinstance(found.storage_data, dict):
        return "it does not list tensors and where they are"
    for key, entry in found.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata):
            continue
        if not isinstance(entry, TensorStorageMetadata) or not isinstance(
            entry.properties.dtype, torch.dtype
        ):
            return f"{key} has no type"
        sizes = [entry.size, *(s for chunk in entry.chunks for s in (chunk.offsets, chunk.sizes))]
        if not all(_are_sizes(size, len(entry.size)) for size in sizes):
            return f"{key} has no shape"
    for index, place in found.storage_data.items():
        if not isinstance(index, MetadataIndex) or not isinstance(place, _StorageInfo):
            return "it does not say where its tensors are"
        if place.relative_path != Path(place.relative_path).name or not _are_sizes(
            (place.offset, place.length), 2
        ):
            return f"{index.fqn} is said to be in {place.relative_path!r} at {place.offset!r}"
        if index.offset is not None and not isinstance(index.offset, torch.Size):
            return f"{index.fqn} has the offset {index.offset!r}"
    return None


def _are_sizes(values: Any, length: int) -> bool:
    return (
        isinstance(values, tuple)
        and len(values) == length
        and all(type(value) is int and value >= 0 for value in values)
    )


def check_items(folder: Path, *, part: int = 0, num_parts: int = 1) -> None:
    """Refuses a folder whose index, or one of whose saved objects, would run something when Megatron loads
    it (tensors are loaded by torch as tensors only), or that holds what Megatron would wait for, or read
    elsewhere: FIFOs, devices, links out of it.

    Args:
        part, num_parts: look at this share of the objects only, so that ranks share them.

    Raises:
        FileNotFoundError: the folder has no index.
        CheckpointError: it asks for what no checkpoint needs, or is damaged.
    """
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or not path.is_dir():
            try:
                open_regular(path, inside=folder, buffered=False).close()
            except OSError as error:
                raise CheckpointError(f"{path} {error.strerror}; copy the checkpoint again") from error
    index = read_metadata(folder)
    objects = [
        (key, place)
        for key, place in index.storage_data.items()
        if not isinstance(index.state_dict_metadata.get(key.fqn), TensorStorageMetadata)
    ]
    for key, place in objects[part::num_parts]:
        path = folder / place.relative_path
        with open_regular(path, inside=folder, buffered=False) as file:
            data = os.pread(file.fileno(), place.length, place.offset)
        check_saved(data, f"{path}: {key.fqn}")
