"""Pickles of files that somebody else may have written: read without running anything they ask for.

Unpickling calls whatever function a file names. Here only the names in a list can be called, all of them
harmless; any other is refused, by name. A scan of the operations comes first (``pickle_scan``), so that no
short file takes hours or all memory.
"""

from __future__ import annotations

import collections
import io
import pathlib
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Final

import torch
from torch.distributed.checkpoint import filesystem, metadata

from copd_megatron.checkpoint.manifest import CheckpointError
from copd_megatron.checkpoint.pickle_scan import MAX_BYTES, NameRefusedError, Rules, scan_pickle
from copd_megatron.untrusted.regular_file import read_regular

_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
METADATA_NAMES: Final[Mapping[tuple[str, str], Any]] = {
    **{("torch", name): dtype for name, dtype in _DTYPES.items()},
    **{
        (metadata.__name__, name): getattr(metadata, name)
        for name in (
            "_MEM_FORMAT_ENCODING",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
        )
    },
    (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("pathlib", "PosixPath"): pathlib.PurePosixPath,
    # what older versions of Megatron-Core wrote; it has the fields of torch's
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"): metadata.Metadata,
}
"""What the index of ``torch.distributed.checkpoint`` is made of: (module, name) to what stands for it."""

_INDEX_RULES = Rules(names=METADATA_NAMES, index=((metadata.__name__, "MetadataIndex"),))
_OBJECT_RULES = Rules(names=None, only_texts_and_indices=False, max_weight=10_000)
"""Of objects beside the tensors: random states are tuples of hundreds of numbers. torch checks the names."""

_DAMAGE = (
    *(pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, KeyError),
    *(MemoryError, OverflowError, RecursionError, TypeError, ValueError),
)
"""What unpickling raises on bytes that are no pickle, or a damaged one."""


class _Unpickler(pickle.Unpickler):
    """Finds the names in a list only."""

    def __init__(self, file: IO[bytes], allowed: Mapping[tuple[str, str], Any]) -> None:
        super().__init__(file)
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._allowed:
            raise NameRefusedError(f"{module}.{name}")
        return self._allowed[module, name]


def load_metadata(path: Path) -> Any:
    """What the pickle ``.metadata`` of ``torch.distributed.checkpoint`` holds.

    Raises:
        CheckpointError: it is damaged, or asks for anything that such an index is not made of.
        OSError: it cannot be read.
    """
    data = read_regular(path, MAX_BYTES)
    try:
        scan_pickle(data, _INDEX_RULES)
        return _Unpickler(io.BytesIO(data), METADATA_NAMES).load()
    except NameRefusedError as refused:
        raise CheckpointError(refusal(path, str(refused))) from None
    except _DAMAGE as error:
        reason = repr(error)[:400]
        raise CheckpointError(f"{path} is damaged: {reason}; copy the checkpoint again") from error


def check_saved(data: bytes, where: str) -> None:
    """Refuses what ``torch.save`` wrote if loading it would run anything.

    Raises:
        CheckpointError: it asks for a name that torch does not count as safe, or is damaged.
    """
    try:
        reader = torch._C.PyTorchFileReader(io.BytesIO(data))  # the one that torch.load reads with
        scan_pickle(reader.get_record("data.pkl"), _OBJECT_RULES)
        # Transformer Engine's bookkeeping is saved as bytes in memory
        with torch.serialization.safe_globals([io.BytesIO]):
            torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (RuntimeError, *_DAMAGE) as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named is None:
            reason = repr(error)[:400]
            raise CheckpointError(f"{where} is damaged: {reason}; copy the checkpoint again") from error
        raise CheckpointError(refusal(where, named[1])) from None


def refusal(where: object, name: str) -> str:
    """What is said of a file that asks for a name it must not have."""
    return (
        f"{where} asks for {name}, which no checkpoint needs: loading it could run a program. It is not "
        "loaded; delete it, and get the checkpoint from a source that you trust"
    )
