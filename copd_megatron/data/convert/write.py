"""Writing webdataset shards: all of them or none, and the same bytes for the same samples.

``webdataset.TarWriter`` would write the same bytes (a test compares them), but importing the package imports
torch: 3.4 s of CPU time and 610 MB more for a tool that otherwise needs 1.7 s and 120 MB. A member is three
lines of ``tarfile``, which TarWriter uses too.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import secrets
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    """None: its running number in the data set. See ``key_problem``."""
    media: Mapping[str, bytes] = field(default_factory=dict)
    """Further members by extension: ``{"0.png": ..., "mp4": ...}``."""


def write_shards(
    samples: Iterable[NewSample], out: Path, prefix: str, *, shard_size: int = 1000, overwrite: bool = False
) -> list[Path]:
    """Write ``<out>/<prefix>-000000.tar`` and so on, ``shard_size`` samples in each; return their paths.

    The shards appear under their names once all of them are complete, and replace older ones only then: if
    anything fails, the folder is as before. Equal samples give equal bytes.

    Raises DataError: shards of that prefix exist (unless ``overwrite``), no samples, a bad or repeated key,
    a bad extension, metadata that JSON cannot hold.
    """
    if shard_size < 1:
        raise DataError(f"shard size {shard_size} is below 1. Use some hundreds or thousands of samples.")
    old = existing_shards(out, prefix)
    if old and not overwrite:
        raise DataError(
            f"{out} already holds {len(old)} shard(s) named {prefix}-*.tar. "
            "Choose another name or folder, or ask for overwriting."
        )
    if others := [path for path in old if not path.is_file()]:
        raise DataError(f"{others[0]} is in the place of a shard and is no file. Move it.")
    out.mkdir(parents=True, exist_ok=True)
    written: list[_TarWriter] = []
    try:
        for number, (key, sample) in enumerate(_keyed(samples, prefix)):
            if number % shard_size == 0:
                if written:
                    written[-1].close()
                written.append(_TarWriter(out / f"{prefix}-{len(written):06d}.tar"))
            written[-1].add(key, sample)
        if not written:
            raise DataError(f"there are no samples to write to {out / prefix}-*.tar. Check the source.")
        written[-1].close()
    except BaseException:
        for writer in written:
            writer.abandon()
        raise
    for path in old:
        path.unlink()
    for writer in written:
        writer.publish()
    return [writer.path for writer in written]


def key_problem(key: str) -> str | None:
    """Why a sample cannot have this key; None if it can.

    A dot would end the key in a member's name, and a slash would be a folder.
    """
    if key and key.isprintable() and not set(key) & set("./\\"):
        return None
    return f"key {key!r} is empty or has a dot, a slash or a character that cannot be printed"


def existing_shards(out: Path, prefix: str) -> list[Path]:
    """Shards of this prefix that the folder holds, sorted."""
    return sorted(path for path in out.glob("*.tar") if _is_shard_of(path.name, prefix))


def refuse_existing(out: Path, name: str) -> None:
    """Raises DataError if the folder holds shards of either split of a domain, before anything is written."""
    for split in ("train", "validation"):
        if existing_shards(out, f"{name}-{split}"):
            raise DataError(
                f"{out} already holds {name}-{split}-*.tar. Choose another name or folder, or overwrite them."
            )


def remove_validation(out: Path, name: str) -> None:
    """Deletes a domain's validation shards where it was written anew without any: their prompts may be
    training samples now."""
    for path in existing_shards(out, f"{name}-validation"):
        path.unlink()


def _is_shard_of(name: str, prefix: str) -> bool:
    number = name.removeprefix(prefix + "-").removesuffix(".tar")
    return name == f"{prefix}-{number}.tar" and number.isdigit()


def _keyed(samples: Iterable[NewSample], prefix: str) -> Iterator[tuple[str, NewSample]]:
    """Samples with their keys. Raises DataError: a key that is bad or occurs twice."""
    keys: set[str] = set()
    for number, sample in enumerate(samples):
        key = sample.key if sample.key is not None else f"{number:09d}"
        problem = f"key {key!r} occurs twice" if key in keys else key_problem(key)
        if problem is not None:
            raise DataError(f"sample {number} of {prefix}: {problem}. Use plain, unique keys.")
        keys.add(key)
        yield key, sample


class _TarWriter:
    """One shard, under a temporary name until ``publish``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
        self._file = open(self._temporary, "xb")  # noqa: SIM115
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.PAX_FORMAT)  # noqa: SIM115

    def add(self, key: str, sample: NewSample) -> None:
        prompt = sample.prompt if isinstance(sample.prompt, str) else [dict(part) for part in sample.prompt]
        record = {
            "prompt": prompt,
            "answer": sample.answer,
            "verifier": sample.verifier,
            "metadata": dict(sample.metadata),
        }
        try:
            text = json.dumps(record, ensure_ascii=False, sort_keys=True, allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise DataError(f"sample {key!r} of {self.path.name}: not storable as JSON ({error}).") from error
        self._member(f"{key}.json", text)
        for extension, data in sorted(sample.media.items()):
            # webdataset keeps what begins with an underscore for itself
            if extension == "json" or extension[:1] in ("", "_") or "/" in extension:
                raise DataError(
                    f"sample {key!r} of {self.path.name}: a medium cannot have the extension {extension!r}. "
                    "Use extensions such as 0.png or mp4."
                )
            self._member(f"{key}.{extension}", data)

    def _member(self, name: str, data: bytes) -> None:
        # TarInfo's defaults are time, user and group 0 and mode 644: nothing of this moment is in the bytes
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))

    def close(self) -> None:
        """Completes the file. Raises OSError, on a full disk for example."""
        self._tar.close()
        self._file.close()

    def publish(self) -> None:
        os.replace(self._temporary, self.path)

    def abandon(self) -> None:
        with contextlib.suppress(OSError):  # a full disk, which is perhaps why it is abandoned
            self._tar.close()
        with contextlib.suppress(OSError):
            self._file.close()
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
