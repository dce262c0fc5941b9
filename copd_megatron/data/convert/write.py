"""Writing webdataset shards: all sets of them or none, and the same bytes for the same samples.

``webdataset.TarWriter`` would write the same bytes (a test compares them), but importing the package imports
torch: 3.4 s of CPU time and 610 MB more for a tool that otherwise needs 1.7 s and 120 MB. A member is three
lines of ``tarfile``, which TarWriter uses too.
"""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from copd_megatron.data.convert.staging import Staging
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
    """Write ``<out>/<prefix>-000000.tar`` and so on, as ``write_sets`` does; return their paths."""
    return write_sets({prefix: samples}, out, shard_size=shard_size, overwrite=overwrite)[prefix]


def write_domain_shards(
    train: Iterable[NewSample],
    validation: Iterable[NewSample] | None,
    out: Path,
    name: str,
    *,
    shard_size: int = 1000,
    overwrite: bool = False,
) -> tuple[list[Path], list[Path]]:
    """Write ``<out>/<name>-train-NNNNNN.tar`` and ``<name>-validation-NNNNNN.tar``, as ``write_sets`` does.

    ``validation`` None: there is none, and shards of an older one are deleted: their prompts may be training
    samples now.
    """
    sets = {f"{name}-train": train, f"{name}-validation": validation}
    written = write_sets(sets, out, shard_size=shard_size, overwrite=overwrite)
    return written[f"{name}-train"], written[f"{name}-validation"]


def write_sets(
    sets: Mapping[str, Iterable[NewSample] | None],
    out: Path,
    *,
    shard_size: int = 1000,
    overwrite: bool = False,
) -> dict[str, list[Path]]:
    """Write ``<out>/<prefix>-000000.tar`` and so on for each set, ``shard_size`` samples in each.

    All shards of all sets are complete before the first one appears under its name or replaces an older one:
    if anything fails before that, the folder is as before. Equal samples give equal bytes.

    Args:
        sets: samples by prefix. None: the set is empty, and older shards of it are deleted.

    Returns:
        Paths of the shards, by prefix.

    Raises:
        DataError: shards of a prefix exist (unless ``overwrite``), no samples, a bad or repeated key, a bad
            extension, metadata that JSON cannot hold.
        OSError: the shards cannot be written; it names the file and says how the folder was left.
    """
    if shard_size < 1:
        raise DataError(f"shard size {shard_size} is below 1. Use some hundreds or thousands of samples.")
    old = {prefix: existing_shards(out, prefix) for prefix in sets}
    for prefix, shards in old.items():
        if shards and not overwrite:
            raise DataError(
                f"{out} already holds {len(shards)} shard(s) named {prefix}-*.tar. "
                "Choose another name or folder, or ask for overwriting."
            )
        if others := [path for path in shards if not path.is_file()]:
            raise DataError(f"{others[0]} is in the place of a shard and is no file. Move it.")
    out.mkdir(parents=True, exist_ok=True)
    with Staging(out) as staging:
        new = {
            prefix: [] if samples is None else _write(samples, staging, prefix, shard_size)
            for prefix, samples in sets.items()
        }
        staging.publish(new, old)
    return {prefix: [out / name for name in names] for prefix, names in new.items()}


def _write(samples: Iterable[NewSample], staging: Staging, prefix: str, shard_size: int) -> list[str]:
    """Writes one set into the staging folder; returns the names of its shards."""
    names: list[str] = []
    open_one: _TarWriter | None = None
    try:
        for number, (key, sample) in enumerate(_keyed(samples, prefix)):
            if number % shard_size == 0:
                if open_one is not None:
                    open_one.close()
                names.append(f"{prefix}-{len(names):06d}.tar")
                open_one = _TarWriter(staging, names[-1])
            assert open_one is not None
            open_one.add(key, sample)
        if open_one is None:
            raise DataError(
                f"there are no samples to write to {staging.out / prefix}-*.tar. Check the source."
            )
        open_one.close()
    except BaseException:
        if open_one is not None:
            open_one.abandon()
        raise
    return names


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
    """One shard in the staging folder."""

    def __init__(self, staging: Staging, name: str) -> None:
        self.name, self._staging = name, staging
        with staging.failures(name):
            self._file = open(staging.folder / name, "xb")  # noqa: SIM115
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
            raise DataError(f"sample {key!r} of {self.name}: not storable as JSON ({error}).") from error
        self._member(f"{key}.json", text)
        for extension, data in sorted(sample.media.items()):
            # webdataset keeps what begins with an underscore for itself
            if extension == "json" or extension[:1] in ("", "_") or "/" in extension:
                raise DataError(
                    f"sample {key!r} of {self.name}: a medium cannot have the extension {extension!r}. "
                    "Use extensions such as 0.png or mp4."
                )
            self._member(f"{key}.{extension}", data)

    def _member(self, name: str, data: bytes) -> None:
        # TarInfo's defaults are time, user and group 0 and mode 644: nothing of this moment is in the bytes
        info = tarfile.TarInfo(name)
        info.size = len(data)
        with self._staging.failures(self.name):
            self._tar.addfile(info, io.BytesIO(data))

    def close(self) -> None:
        """Completes the file. Raises OSError, on a full disk for example."""
        with self._staging.failures(self.name):
            self._tar.close()
            self._file.close()

    def abandon(self) -> None:
        with contextlib.suppress(OSError):  # a full disk, which is perhaps why it is abandoned
            self._tar.close()
        with contextlib.suppress(OSError):
            self._file.close()


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
