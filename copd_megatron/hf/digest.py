"""Telling whether two folders hold the same model, without reading all of their weights. Imports no torch."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from copd_megatron.hf.companions import MAX_SMALL_BYTES, companion_files, weight_files
from copd_megatron.untrusted.regular_file import open_regular, read_regular

_WINDOWS, _WINDOW_BYTES = 64, 4096


def model_digest(folder: str | Path) -> str:
    """Hash of the files beside the weights, and of the weight files' sizes and samples of their bytes.

    A copy elsewhere has the same digest. A model trained further has another one, since an update moves
    nearly every weight. A change of single weights may go unnoticed.

    Raises:
        FileNotFoundError, ValueError: as ``weight_files``.
    """
    digest = hashlib.sha256()
    for path in companion_files(Path(folder)):
        digest.update(
            path.name.encode() + b"\0" + hashlib.sha256(read_regular(path, MAX_SMALL_BYTES)).digest()
        )
    for path in weight_files(Path(folder)):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\n".encode())
        with open_regular(path) as file:
            for window in range(_WINDOWS):
                digest.update(os.pread(file.fileno(), _WINDOW_BYTES, size * window // _WINDOWS))
    return digest.hexdigest()[:32]
