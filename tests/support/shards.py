"""Small shards, of good samples or of raw members."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from copd_megatron.data.convert.write import NewSample, write_shards
from copd_megatron.data.tar_scan import TarEntry, scan_open_tar


def new_sample(number: int, **changes: Any) -> NewSample:
    """A good sample; ``changes`` are its fields."""
    fields: dict[str, Any] = {
        "prompt": f"What is {number}?",
        "answer": str(number),
        "verifier": "exact",
        "metadata": {"number": number},
    }
    return NewSample(**{**fields, **changes})


def write(folder: Path, count: int, *, prefix: str = "toy-train", shard_size: int = 10) -> str:
    """Writes ``count`` good samples; returns the pattern that names them."""
    write_shards(map(new_sample, range(count)), folder, prefix, shard_size=shard_size)
    return str(folder / f"{prefix}-*.tar")


def with_other_questions(pattern: str, folder: Path) -> str:
    """Shards of the same names, with other questions of equal lengths; returns their pattern."""
    folder.mkdir()
    for path in Path(pattern).parent.glob(Path(pattern).name):
        (folder / path.name).write_bytes(path.read_bytes().replace(b"What is", b"Half of"))
    return str(folder / Path(pattern).name)


def write_raw(path: Path, members: Sequence[tuple[str, bytes]]) -> str:
    """Writes a tar file of these members as they are; returns its path."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def record(**changes: Any) -> bytes:
    """A sample's JSON; a field given as ``...`` is left out."""
    fields = {"prompt": "Say 1", "answer": "1", "verifier": "exact", "metadata": {}, **changes}
    return json.dumps({name: value for name, value in fields.items() if value is not ...}).encode()


def scan_tar(path: Path) -> list[TarEntry]:
    """The regular files of a tar."""
    with path.open("rb") as file:
        return list(scan_open_tar(file.fileno()))
