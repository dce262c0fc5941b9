"""What a checkpoint holds, which checkpoints are valid, and which to delete. Imports neither torch nor
Megatron."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from copd_megatron.topology.messages import register

logger = logging.getLogger(__name__)

MANIFEST: Final = "manifest.json"
UNFINISHED: Final = ".unfinished"
"""Mark in a checkpoint's folder that a save leaves there until its manifest is written."""
FORMAT: Final = 1
_FOLDER = re.compile(r"step_(\d{6,})")
_READ_BYTES = 8 * 2**20


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, read or used; says which, why, and the remedy."""


@register
@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One file of a checkpoint."""

    path: str
    """Relative to the checkpoint's folder."""
    num_bytes: int
    sha256: str


@register
@dataclass(frozen=True, kw_only=True)
class BranchEntry:
    """One branch of a checkpoint."""

    weight_version: int
    layout: dict[str, int]
    """``tp``, ``pp``, ``cp``, ``ep``, ``dp``."""
    frozen: bool
    """A frozen branch has loop state only; its weights are those of ``model_path``."""
    model_path: str
    """Hugging Face folder that the branch started from: configuration, tokenizer, processor."""
    dims: dict[str, Any]
    """Sizes of the model, as ``ModelDims`` has them."""
    files: tuple[FileEntry, ...]

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)


@register
@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A whole checkpoint."""

    step: int
    """Steps done."""
    branches: dict[str, BranchEntry]
    config: str
    """The resolved configuration, YAML."""
    saved_at: str
    """UTC, ISO 8601."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of the software that wrote it."""
    validation_accuracy: float | None = None
    """Mean over branches and domains, where the model of this step was evaluated."""

    @property
    def files(self) -> list[FileEntry]:
        return [file for branch in self.branches.values() for file in branch.files]

    @property
    def num_bytes(self) -> int:
        return sum(branch.num_bytes for branch in self.branches.values())


# ---- folders ---------------------------------------------------------------------------------------------


def checkpoints_dir(run_dir: Path) -> Path:
    """Where a run's checkpoints are."""
    return run_dir / "checkpoints"


def step_folder(run_dir: Path, step: int) -> Path:
    """The folder of the checkpoint after ``step`` steps."""
    return checkpoints_dir(run_dir) / f"step_{step:06d}"


def step_folders(run_dir: Path) -> dict[int, Path]:
    """Steps for which there is a folder, valid or not, newest first."""
    parent = checkpoints_dir(run_dir)
    if not parent.is_dir():
        return {}
    found = {int(match[1]): path for path in parent.iterdir() if (match := _FOLDER.fullmatch(path.name))}
    return dict(sorted(found.items(), reverse=True))


# ---- reading and writing ---------------------------------------------------------------------------------


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Makes the checkpoint valid: written aside, synced, renamed, and the folder synced.

    Raises:
        OSError: the disk is full or the folder cannot be written; the checkpoint stays invalid.
    """
    content = asdict(manifest)
    record = {"format": FORMAT, "sha256": _digest(content), "manifest": content}
    write_durably(folder / MANIFEST, json.dumps(record, indent=1).encode())
    (folder / UNFINISHED).unlink(missing_ok=True)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: there is none, or it is damaged, or of a later format.
    """
    path = folder / MANIFEST
    try:
        record = json.loads(path.read_bytes())
        content, written = record["manifest"], record["format"]
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no {MANIFEST}: the save was not finished") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from error
    if written != FORMAT:
        raise CheckpointError(f"{path} has format {written}, this version reads {FORMAT}: use the version "
                              "that wrote it")  # fmt: skip
    if record.get("sha256") != _digest(content):
        raise CheckpointError(f"{path} is damaged: its content does not have the digest written in it")
    try:
        return _manifest_of(content)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is no manifest of this version: {error}; use the one that wrote it"
        ) from error


def _manifest_of(content: Mapping[str, Any]) -> Manifest:
    """The manifest that a record holds. Raises TypeError or ValueError where its fields are others."""
    branches = {}
    for name, entry in content["branches"].items():
        files = tuple(_made(FileEntry, file) for file in entry["files"])
        branches[name] = _made(BranchEntry, {**entry, "files": files})
        for path in (Path(name, "x"), *(Path(file.path) for file in files)):
            if len(path.parts) != 2 or path.is_absolute() or ".." in path.parts:
                raise ValueError(f"branch {name!r} has the file {str(path)!r}, which leads out of the folder")
    return _made(Manifest, {**content, "branches": branches})


def _made[T](cls: type[T], record: Mapping[str, Any]) -> T:
    """A dataclass from its fields, each of its type."""
    for name, hint in typing.get_type_hints(cls).items():
        kind = hint if isinstance(hint, types.UnionType) else typing.get_origin(hint) or hint
        value = record.get(name)
        if name in record and not (isinstance(value, kind) or (type(value) is int and isinstance(0.0, kind))):
            raise TypeError(f"{name} is {value!r}")
    return cls(**record)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_durably(path: Path, data: bytes) -> FileEntry:
    """Writes a file so that after a crash it is there as a whole or not at all.

    Returns:
        Its entry, with the path relative to ``path.parent.parent`` (``<branch>/<file>``).
    """
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)
    return FileEntry(
        path=f"{path.parent.name}/{path.name}", num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest()
    )


def sync_folder(folder: Path) -> None:
    """Makes names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def hash_file(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()


# ---- validity --------------------------------------------------------------------------------------------


def size_problems(folder: Path, manifest: Manifest) -> list[str]:
    """Files that are missing or have another size than the manifest says; empty: none."""
    problems = []
    for file in manifest.files:
        try:
            size = (folder / file.path).stat().st_size
        except FileNotFoundError:
            problems.append(f"{folder / file.path} is missing")
            continue
        if size != file.num_bytes:
            problems.append(f"{folder / file.path} has {size} bytes, the manifest says {file.num_bytes}")
    return problems


def hash_problems(folder: Path, manifest: Manifest, *, part: int = 0, num_parts: int = 1) -> list[str]:
    """Files whose content is not what was written; empty: none.

    Args:
        part, num_parts: check only this share of the files (of about equal bytes), so that ranks share it.
    """
    problems = []
    for file in share(manifest.files, part, num_parts):
        try:
            found = hash_file(folder / file.path)
        except OSError as error:
            problems.append(f"{folder / file.path} cannot be read: {error}")
            continue
        if found != file.sha256:
            problems.append(
                f"{folder / file.path} is damaged: SHA-256 {found[:12]}..., the manifest says "
                f"{file.sha256[:12]}..."
            )
    return problems


def share(files: Sequence[FileEntry], part: int, num_parts: int) -> list[FileEntry]:
    """The files of one of ``num_parts`` parts: largest first, each to the part with the fewest bytes."""
    load = [0] * num_parts
    mine = []
    for file in sorted(files, key=lambda f: (-f.num_bytes, f.path)):
        target = load.index(min(load))
        load[target] += file.num_bytes + 1
        if target == part:
            mine.append(file)
    return mine


def complete_checkpoints(run_dir: Path) -> dict[int, Manifest]:
    """Checkpoints that have a manifest and all files in their sizes, newest first. Hashes are not checked."""
    found = {}
    for step, folder in step_folders(run_dir).items():
        try:
            manifest = read_manifest(folder)
        except CheckpointError:
            continue
        if not size_problems(folder, manifest):
            found[step] = manifest
    return found


# ---- what to keep ----------------------------------------------------------------------------------------


def to_delete(scores: Mapping[int, float | None], *, keep_last: int, keep_best: int) -> list[int]:
    """Steps whose checkpoints may go. Pure.

    Args:
        scores: valid checkpoints, step to mean validation accuracy (None: not evaluated).
        keep_last: newest ones that stay; at least 1.
        keep_best: highest scores that stay; of equal ones the newer.
    """
    newest = sorted(scores, reverse=True)
    keep: set[int] = set(newest[: max(keep_last, 1)])
    ranked = sorted(((score, step) for step, score in scores.items() if score is not None), reverse=True)
    keep |= {step for _, step in ranked[:keep_best]}
    return sorted(set(scores) - keep)


def remove_checkpoint(folder: Path) -> None:
    """Deletes a checkpoint, its manifest first, so that a crash on the way leaves none that looks valid."""
    if folder.exists():
        mark_unfinished(folder)
        (folder / MANIFEST).unlink(missing_ok=True)
        sync_folder(folder)
        shutil.rmtree(folder)


def mark_unfinished(folder: Path) -> None:
    """Says that a save has made this folder, so that it may be deleted if the save dies."""
    (folder / UNFINISHED).touch()


def remove_unfinished(run_dir: Path) -> None:
    """Deals with folders without a manifest. What a save that died left behind bears its mark and is deleted;
    anything else may be somebody's, and is renamed and named."""
    for folder in step_folders(run_dir).values():
        if (folder / MANIFEST).exists():
            continue
        if (folder / UNFINISHED).exists():
            logger.info("removing %s, an unfinished save", folder)
            shutil.rmtree(folder)
            continue
        logger.warning(
            "%s has no %s and is not used; renamed to %s", folder, MANIFEST, set_aside(folder, "no_manifest")
        )


def set_aside(folder: Path, why: str = "damaged") -> Path:
    """Renames a checkpoint, so that it is neither read nor counted again; returns the new name."""
    number = 0
    while (target := folder.with_name(f"{folder.name}.{why}{number or ''}")).exists():
        number += 1
    return folder.rename(target)
