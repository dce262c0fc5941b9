"""Files of ``torch.distributed.checkpoint``, which Megatron's distributed format is made of. Torch only.

A ``.distcp`` file is a sequence of items, each as ``torch.save`` writes it; ``.metadata`` (a pickle) says
which tensor's which part lies where.
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
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta

from copd_megatron.checkpoint.manifest import FileEntry, hash_file, sync_folder

METADATA: Final = ".metadata"
BACKEND: Final = "metadata.json"
"""What Megatron knows its format by."""


class HashingFile(io.RawIOBase):
    """A file opened for writing that hashes what passes, appended to only.

    After a failed write it swallows the rest: ``torch.save`` answers an exception from below by writing
    again. ``finish`` raises what went wrong first.
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
        """Brings everything to the disk and closes; returns size and SHA-256.

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
    """Appends one item (a tensor or a ``BytesIO``) to the file called ``name``; where it lies."""
    begin = stream.tell()
    if isinstance(data, io.BytesIO):
        stream.write(data.getbuffer())
    else:
        torch.save(own_storage(data.detach().cpu()), cast(IO[bytes], stream))
    return _StorageInfo(name, begin, stream.tell() - begin)


def own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without the rest of a larger storage, which ``torch.save`` would write as well."""
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
        json.dump({"sharded_backend": "torch_dist", "sharded_backend_version": 1}, text)
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
