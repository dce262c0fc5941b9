"""What a checkpoint holds and whether it is whole, as records for programs and as lines for people.

A joint checkpoint is described from its manifest; a folder in Megatron's format by itself, such as a
converted model or one branch of a checkpoint, from its files. The records hold JSON values only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from copd_megatron.checkpoint.manifest import (
    BranchEntry,
    Manifest,
    hash_file,
    hash_problems,
    read_manifest,
    size_problems,
)
from copd_megatron.formats.megatron_reader import find_folder, megatron_tensors_of, storage_problems

Record = dict[str, Any]


def describe_checkpoint(folder: Path, *, verify: bool = False, threads: int = 4) -> Record:
    """A joint checkpoint: step, versions, branches with their files and tensors, and ``problems``.

    Args:
        verify: compare the SHA-256 of every file, not just its size.
        threads: files that are hashed at once.

    Raises:
        CheckpointError: no manifest, or a damaged one.
    """
    manifest = read_manifest(folder)
    return {
        "folder": str(folder),
        "step": manifest.step,
        "saved_at": manifest.saved_at,
        "validation_accuracy": manifest.validation_accuracy,
        "versions": manifest.versions,
        "num_bytes": manifest.num_bytes,
        "checked": "sizes and hashes" if verify else "sizes",
        "problems": _problems(folder, manifest, verify=verify, threads=threads),
        "branches": {name: _branch(folder / name, entry) for name, entry in manifest.branches.items()},
    }


def describe_folder(folder: Path, *, files: bool = False) -> Record:
    """A folder in Megatron's format, without what a manifest would say. ``problems``: files that its index
    names and that are missing or too short.

    Args:
        files: list every file, and compute its SHA-256.

    Raises:
        FileNotFoundError: no such folder.
        CheckpointError: it is not in Megatron's format, or damaged.
    """
    folder = find_folder(folder)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    record: Record = {
        "folder": str(folder),
        "num_files": len(paths),
        "num_bytes": sum(path.stat().st_size for path in paths),
        "tensors": _totals(folder),
        "problems": storage_problems(folder),
    }
    if files:
        record["files"] = {
            str(path.relative_to(folder)): {"num_bytes": path.stat().st_size, "sha256": hash_file(path)}
            for path in paths
        }
    return record


def tensor_rows(folder: Path) -> list[Record]:
    """Every tensor of a folder in Megatron's format, by name: shape, dtype, chunks, bytes.

    Raises:
        FileNotFoundError, CheckpointError: as ``describe_folder``.
    """
    return [
        {
            "name": key,
            "shape": info.shape,
            "dtype": _dtype(info.dtype),
            "num_chunks": info.num_chunks,
            "num_bytes": info.num_bytes,
        }
        for key, info in sorted(megatron_tensors_of(find_folder(folder)).items())
    ]


def _problems(folder: Path, manifest: Manifest, *, verify: bool, threads: int) -> list[str]:
    found = size_problems(folder, manifest)
    if not verify or found:
        return found

    def problems_of(part: int) -> list[str]:
        return hash_problems(folder, manifest, part=part, num_parts=threads)

    with ThreadPoolExecutor(threads) as pool:  # hashing runs outside the interpreter's lock
        return [problem for part in pool.map(problems_of, range(threads)) for problem in part]


def _branch(folder: Path, entry: BranchEntry) -> Record:
    record: Record = {
        "weight_version": entry.weight_version,
        "layout": entry.layout,
        "frozen": entry.frozen,
        "model_path": entry.model_path,
        "architecture": entry.dims.get("architecture"),
        "num_files": len(entry.files),
        "num_bytes": entry.num_bytes,
        "files": {file.path: {"num_bytes": file.num_bytes, "sha256": file.sha256} for file in entry.files},
    }
    if not entry.frozen:
        record["tensors"] = _totals(folder)
    return record


def _totals(folder: Path) -> dict[str, dict[str, int]]:
    """Tensors and bytes by what they belong to and their type: ``{"weights float32": {...}}``."""
    count: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for key, info in megatron_tensors_of(folder).items():
        kind = {"optimizer": "optimizer", "teacher": "teacher"}.get(key.split(".")[0], "weights")
        label = f"{kind} {_dtype(info.dtype)}"
        count[label] += 1
        size[label] += info.num_bytes
    return {label: {"num_tensors": count[label], "num_bytes": size[label]} for label in sorted(count)}


def _dtype(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


# ---- for people ------------------------------------------------------------------------------------------


def checkpoint_lines(record: Record, *, files: bool = False) -> Iterator[str]:
    """A record of ``describe_checkpoint``; ``files``: with the size and SHA-256 of every file."""
    state = "whole" if not record["problems"] else "DAMAGED"
    yield f"{record['folder']}: step {record['step']}, {_size(record['num_bytes'])}, {state} " + (
        f"({record['checked']} checked)"
    )
    yield f"  saved {record['saved_at']} by " + ", ".join(f"{n} {v}" for n, v in record["versions"].items())
    if record["validation_accuracy"] is not None:
        yield f"  mean validation accuracy {record['validation_accuracy']:.4f}"
    for problem in record["problems"]:
        yield f"  {problem}"
    for name, branch in record["branches"].items():
        layout = " x ".join(f"{k} {v}" for k, v in branch["layout"].items() if v > 1) or "one rank"
        yield (
            f"  {name}: {branch['architecture']}, weights version {branch['weight_version']}, {layout}, "
            f"{branch['num_files']} files, {_size(branch['num_bytes'])}"
            + (", frozen (no weights)" if branch["frozen"] else "")
        )
        yield from _total_lines(branch.get("tensors", {}))
        if files:
            yield from _file_lines(branch["files"])


def folder_lines(record: Record) -> Iterator[str]:
    """A record of ``describe_folder``."""
    state = ", DAMAGED" if record["problems"] else ""
    yield f"{record['folder']}: {record['num_files']} files, {_size(record['num_bytes'])}{state}"
    yield from (f"  {problem}" for problem in record["problems"])
    yield from _total_lines(record["tensors"])
    yield from _file_lines(record.get("files", {}))


def tensor_lines(rows: Sequence[Record]) -> Iterator[str]:
    """Rows of ``tensor_rows``."""
    for row in rows:
        shape = " x ".join(map(str, row["shape"]))
        yield f"{row['name']}  [{shape}] {row['dtype']}, {row['num_chunks']} chunks"


def _total_lines(totals: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    for label, total in totals.items():
        yield f"    {label}: {total['num_tensors']} tensors, {_size(total['num_bytes'])}"


def _file_lines(files: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for path, file in files.items():
        yield f"    {file['sha256']}  {path}, {_size(file['num_bytes'])}"


def _size(num_bytes: int) -> str:
    """``8.04 GB``"""
    size, unit = float(num_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.3g} {unit}"
