"""What a checkpoint holds, which checkpoints are valid, and which to delete. Imports neither torch nor
Megatron."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from copd_megatron.errors import CheckpointError
from copd_megatron.topology.messages import register
from copd_megatron.untrusted.json_text import dumped, load_file, loadable, made
from copd_megatron.untrusted.regular_file import sha256_of
from copd_megatron.untrusted.whole_file import sync_folder, write_whole

logger = logging.getLogger(__name__)

MANIFEST: Final = "manifest.json"
UNFINISHED: Final = ".unfinished"
"""File in a checkpoint's folder, from the beginning of a save until its manifest is written."""
LOOP_STATE: Final = "loop.json"
"""File in a branch's folder: what its loop remembers, such as positions in the data."""
FORMAT: Final = 1
_FOLDER = re.compile(r"step_(\d{6,})")
_DAMAGED = "damaged"


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
    """Mean over branches and domains, where the model of this step was evaluated and got a score on each."""

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
    """Steps that have a folder, valid or not, newest first."""
    parent = checkpoints_dir(run_dir)
    if not parent.is_dir():
        return {}
    found = {int(match[1]): path for path in parent.iterdir() if (match := _FOLDER.fullmatch(path.name))}
    return dict(sorted(found.items(), reverse=True))


# ---- reading and writing ---------------------------------------------------------------------------------


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Makes the checkpoint valid. The manifest is written under another name, synced and renamed.

    Raises:
        OSError: the disk is full or the folder cannot be written; the checkpoint stays invalid.
    """
    content = loadable(asdict(manifest))
    record = {"format": FORMAT, "sha256": _digest(content), "manifest": content}
    write_durably(folder / MANIFEST, dumped(record, indent=1).encode())
    (folder / UNFINISHED).unlink(missing_ok=True)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: there is none, it is damaged, or it has another format.
    """
    path = folder / MANIFEST
    try:
        record = load_file(path)
        content, written = record["manifest"], record["format"]
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no {MANIFEST}: the save was not finished") from None
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from error
    if written != FORMAT:
        raise CheckpointError(f"{path} has format {written}, this version reads {FORMAT}: use the version "
                              "that wrote it")  # fmt: skip
    if record.get("sha256") != _digest(content):
        raise CheckpointError(f"{path} is damaged: its content does not have the digest written in it")
    try:
        return _manifest_of(content)
    except ValueError as error:
        raise CheckpointError(
            f"{path} is no manifest of this version: {error}; use the one that wrote it"
        ) from error


def _manifest_of(content: Mapping[str, Any]) -> Manifest:
    """The manifest that a record holds. Raises ValueError where its fields are others."""
    manifest = made(Manifest, content)
    for name, entry in manifest.branches.items():
        for path in (Path(name, "x"), *(Path(file.path) for file in entry.files)):
            if len(path.parts) != 2 or path.is_absolute() or ".." in path.parts:
                raise ValueError(f"branch {name!r} has the file {str(path)!r}, which leads out of the folder")
    return manifest


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


def write_durably(path: Path, data: bytes) -> FileEntry:
    """Writes a file so that a crash leaves the whole of it or nothing.

    Returns:
        Its entry, with the path relative to ``path.parent.parent`` (``<branch>/<file>``).
    """
    write_whole(path, data, durable=True)
    return FileEntry(
        path=f"{path.parent.name}/{path.name}", num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest()
    )


def hash_file(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    return sha256_of(path)


# ---- validity --------------------------------------------------------------------------------------------


def size_problems(folder: Path, manifest: Manifest) -> list[str]:
    """What is wrong with the presence and sizes of the files; empty if nothing is."""
    problems = []
    for file in manifest.files:
        try:
            size = (folder / file.path).stat().st_size
        except FileNotFoundError:
            problems.append(f"{folder / file.path} is missing")
            continue
        except (OSError, ValueError) as error:  # a name that no file can have
            problems.append(f"{folder}: {file.path!r:.200} cannot be looked at ({error})")
            continue
        if size != file.num_bytes:
            problems.append(f"{folder / file.path} has {size} bytes, the manifest says {file.num_bytes}")
    return problems


def hash_problems(folder: Path, manifest: Manifest, *, part: int = 0, num_parts: int = 1) -> list[str]:
    """What is wrong with the content of the files; empty if nothing is.

    Args:
        part, num_parts: check this share of the files only (all have about equal bytes), so that ranks can
            divide the work.
    """
    problems = []
    for file in share(manifest.files, part, num_parts):
        try:
            found = hash_file(folder / file.path)
        except (OSError, ValueError) as error:
            problems.append(f"{folder}: {file.path!r:.200} cannot be read: {error}")
            continue
        if found != file.sha256:
            problems.append(
                f"{folder / file.path} is damaged: SHA-256 {found[:12]}..., the manifest says "
                f"{file.sha256[:12]}..."
            )
    return problems


def share(files: Sequence[FileEntry], part: int, num_parts: int) -> list[FileEntry]:
    """The files of one of ``num_parts`` parts. The largest come first, each to the part with the fewest
    bytes."""
    load = [0] * num_parts
    mine = []
    for file in sorted(files, key=lambda f: (-f.num_bytes, f.path)):
        target = load.index(min(load))
        load[target] += file.num_bytes + 1
        if target == part:
            mine.append(file)
    return mine


def complete_checkpoints(run_dir: Path) -> dict[int, Manifest]:
    """Checkpoints with a manifest and all their files in the right sizes, newest first. Does not check
    hashes."""
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
    """Steps whose checkpoints may be deleted. Pure.

    Args:
        scores: valid checkpoints, step to mean validation accuracy (None: not evaluated).
        keep_last: how many of the newest stay; at least 1.
        keep_best: how many of the best scores stay; of equal ones, the newer.
    """
    newest = sorted(scores, reverse=True)
    keep: set[int] = set(newest[: max(keep_last, 1)])
    ranked = sorted(((score, step) for step, score in scores.items() if score is not None), reverse=True)
    keep |= {step for _, step in ranked[:keep_best]}
    return sorted(set(scores) - keep)


def make_folders(folder: Path, branches: Iterable[str]) -> None:
    """Makes the folders of a new checkpoint, marked as unfinished. Whatever is there already was made by
    nobody who should: it is renamed and named.

    Raises:
        OSError: they cannot be made.
    """
    if folder.is_symlink() or folder.exists():
        logger.warning(
            "%s was there before its step was saved; renamed to %s", folder, set_aside(folder, "old")
        )
    folder.mkdir(parents=True)
    (folder / UNFINISHED).touch()
    for branch in branches:
        (folder / branch).mkdir()
    sync_folder(folder.parent)
    sync_folder(folder)


def remove_checkpoint(folder: Path) -> None:
    """Deletes a checkpoint, its manifest first, so that a crash on the way leaves none that looks valid. Of a
    link, only the link.

    Raises:
        OSError: something cannot be deleted.
    """
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        with contextlib.suppress(OSError):  # a full disk, which this will mend
            (folder / UNFINISHED).touch()
        (folder / MANIFEST).unlink(missing_ok=True)
        sync_folder(folder)
        shutil.rmtree(folder)


def remove_unfinished(run_dir: Path) -> None:
    """Deals with folders without a manifest. What a save that died left behind bears its mark and is deleted.
    Anything else may be somebody's, so it is renamed and named."""
    for folder in step_folders(run_dir).values():
        if (folder / MANIFEST).exists():
            continue
        if (folder / UNFINISHED).exists():
            logger.info("removing %s, an unfinished save", folder)
            remove_checkpoint(folder)
            continue
        logger.warning(
            "%s has no %s and is not used; renamed to %s", folder, MANIFEST, set_aside(folder, "no_manifest")
        )


def set_aside_before(run_dir: Path) -> list[Path]:
    """Damaged checkpoints that earlier starts of the run have renamed."""
    return sorted(checkpoints_dir(run_dir).glob(f"step_*.{_DAMAGED}*"))


def set_aside(folder: Path, why: str = _DAMAGED) -> Path:
    """Renames a checkpoint, so that it is neither read nor counted again; returns the new name."""
    number = 0
    while os.path.lexists(target := folder.with_name(f"{folder.name}.{why}{number or ''}")):
        number += 1
    return folder.rename(target)
