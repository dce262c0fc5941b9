"""Writing webdataset shards: whole or not at all, and the same bytes for the same samples."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from copd_megatron.errors import DataError


@dataclass(frozen=True, kw_only=True)
class NewSample:
    """A sample to write; fields as in ``samples.Sample``."""

    prompt: str | Sequence[Mapping[str, Any]]
    answer: str
    verifier: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    key: str | None = None
    """Null: its running number in the data set. No dots or slashes."""
    media: Mapping[str, bytes] = field(default_factory=dict)
    """Further members by extension: ``{"0.png": ..., "mp4": ...}``."""


def write_shards(
    samples: Iterable[NewSample], out: Path, prefix: str, *, shard_size: int = 1000, overwrite: bool = False
) -> list[Path]:
    """Write ``<out>/<prefix>-000000.tar`` and so on, ``shard_size`` samples in each; return their paths.

    A shard appears under its name when it is complete. Equal samples give equal bytes.

    Raises DataError: shards of that prefix exist (unless ``overwrite``, which removes them first), no
    samples, a key twice or with a dot or slash, metadata that JSON cannot hold.
    """
    if shard_size < 1:
        raise DataError(f"shard size {shard_size} is below 1. Use some hundreds or thousands of samples.")
    old = existing_shards(out, prefix)
    if old and not overwrite:
        raise DataError(
            f"{out} already holds {len(old)} shard(s) named {prefix}-*.tar. "
            "Choose another name or folder, or ask for overwriting."
        )
    out.mkdir(parents=True, exist_ok=True)
    for path in old:
        path.unlink()
    paths: list[Path] = []
    keys: set[str] = set()
    writer: _ShardWriter | None = None
    try:
        for number, sample in enumerate(samples):
            if number % shard_size == 0:
                if writer is not None:
                    writer.finish()
                writer = _ShardWriter(out / f"{prefix}-{len(paths):06d}.tar")
                paths.append(writer.path)
            assert writer is not None
            key = sample.key if sample.key is not None else f"{number:09d}"
            if not key or key in keys or set(key) & set("./\\"):
                why = "occurs twice" if key in keys else "is empty or has a dot or slash"
                raise DataError(f"sample {number} of {prefix}: key {key!r} {why}. Use plain, unique keys.")
            keys.add(key)
            writer.add(key, sample)
        if writer is not None:
            writer.finish()
    except BaseException:
        if writer is not None:
            writer.abandon()
        raise
    if not paths:
        raise DataError(f"there are no samples to write to {out / prefix}-*.tar. Check the source.")
    return paths


def existing_shards(out: Path, prefix: str) -> list[Path]:
    """Shards of this prefix that the folder holds, sorted."""
    return sorted(path for path in out.glob("*.tar") if _is_shard_of(path.name, prefix))


def _is_shard_of(name: str, prefix: str) -> bool:
    number = name.removeprefix(prefix + "-").removesuffix(".tar")
    return name == f"{prefix}-{number}.tar" and number.isdigit()


class _ShardWriter:
    """One shard under a temporary name until it is complete."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._tar = tarfile.open(self._temporary, mode="w", format=tarfile.PAX_FORMAT)  # noqa: SIM115

    def add(self, key: str, sample: NewSample) -> None:
        prompt = sample.prompt if isinstance(sample.prompt, str) else [dict(part) for part in sample.prompt]
        record = {
            "prompt": prompt,
            "answer": sample.answer,
            "verifier": sample.verifier,
            "metadata": dict(sample.metadata),
        }
        try:
            text = json.dumps(record, ensure_ascii=False, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise DataError(f"sample {key!r} of {self.path.name}: not storable as JSON ({error}).") from error
        self._member(f"{key}.json", text.encode())
        for extension, data in sorted(sample.media.items()):
            self._member(f"{key}.{extension}", data)

    def _member(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)  # defaults: mtime, uid and gid 0, mode 644: nothing of this moment
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))

    def finish(self) -> None:
        self._tar.close()
        os.replace(self._temporary, self.path)

    def abandon(self) -> None:
        self._tar.close()
        self._temporary.unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True)
class WrittenDomain:
    """Shards written for one domain."""

    train: list[Path]
    validation: list[Path]
    num_train: int
    num_validation: int

    def describe(self, out: Path) -> str:
        """One line for a person."""
        return (
            f"{self.num_train} training samples in {len(self.train)} shard(s), {self.num_validation} "
            f"validation samples in {len(self.validation)} shard(s): {out}"
        )
