#!/usr/bin/env python3
"""Say what a checkpoint holds and whether it is whole.

    inspect_checkpoint.py runs/copd                                        the run's checkpoints
    inspect_checkpoint.py runs/copd/checkpoints/step_000100                layout, sizes, types, versions
    inspect_checkpoint.py runs/copd/checkpoints/step_000100 --verify       reads and hashes every file
    inspect_checkpoint.py runs/copd/checkpoints/step_000100 --files        every file's size and SHA-256
    inspect_checkpoint.py runs/copd/checkpoints/step_000100/text --tensors

Exit status: 0 whole, 1 damaged or unfinished. Sizes are always compared; hashes with --verify. A folder that
tools/convert_hf_to_megatron.py wrote has no manifest: what it holds is shown, its hashes are computed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from copd_megatron.checkpoint.manifest import (
    MANIFEST,
    BranchEntry,
    CheckpointError,
    Manifest,
    hash_file,
    hash_problems,
    read_manifest,
    size_problems,
    step_folders,
)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, help="run directory, checkpoint, or a branch's folder")
    parser.add_argument("--verify", action="store_true", help="compare the SHA-256 of every file")
    parser.add_argument("--files", action="store_true", help="list every file with its size and SHA-256")
    parser.add_argument("--tensors", action="store_true", help="list every tensor of a branch's folder")
    parser.add_argument("--threads", type=int, default=4, help="that hash at once")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    return parser.parse_args(arguments)


def problems_of(folder: Path, manifest: Manifest, *, verify: bool, threads: int) -> list[str]:
    """What is wrong with a checkpoint's files."""
    found = size_problems(folder, manifest)
    if verify and not found:  # hashing runs outside the interpreter's lock
        with ThreadPoolExecutor(threads) as pool:
            parts = pool.map(lambda part: hash_problems(folder, manifest, part=part, num_parts=threads),
                             range(threads))  # fmt: skip
            found = [problem for part in parts for problem in part]
    return found


def describe_branch(folder: Path, entry: BranchEntry) -> dict[str, Any]:
    """One branch of a checkpoint."""
    record: dict[str, Any] = {
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
        record["tensors"] = tensor_totals(folder)
    return record


def tensor_totals(folder: Path) -> dict[str, dict[str, int]]:
    """Tensors and bytes by what they belong to and type: ``{"weights float32": {...}}``."""
    from copd_megatron.formats.megatron_reader import megatron_tensors_of

    count: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for key, info in megatron_tensors_of(folder).items():
        kind = {"optimizer": "optimizer", "teacher": "teacher"}.get(key.split(".")[0], "weights")
        label = f"{kind} {_dtype(info.dtype)}"
        count[label] += 1
        size[label] += info.num_bytes
    return {label: {"num_tensors": count[label], "num_bytes": size[label]} for label in sorted(count)}


def describe(folder: Path, manifest: Manifest, problems: list[str], *, verified: bool) -> dict[str, Any]:
    """A whole checkpoint."""
    return {
        "folder": str(folder),
        "step": manifest.step,
        "saved_at": manifest.saved_at,
        "validation_accuracy": manifest.validation_accuracy,
        "versions": manifest.versions,
        "num_bytes": manifest.num_bytes,
        "checked": "sizes and hashes" if verified else "sizes",
        "problems": problems,
        "branches": {n: describe_branch(folder / n, e) for n, e in manifest.branches.items()},
    }


def as_text(record: dict[str, Any], *, files: bool) -> Iterator[str]:
    """The same for people; ``files``: with every file's size and hash."""
    state = "whole" if not record["problems"] else "DAMAGED"
    yield f"{record['folder']}: step {record['step']}, {size_text(record['num_bytes'])}, {state} " + (
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
            f"{branch['num_files']} files, {size_text(branch['num_bytes'])}"
            + (", frozen (no weights)" if branch["frozen"] else "")
        )
        for label, total in branch.get("tensors", {}).items():
            yield f"    {label}: {total['num_tensors']} tensors, {size_text(total['num_bytes'])}"
        if files:
            yield from _file_lines(branch["files"])


def _file_lines(files: dict[str, dict[str, Any]]) -> Iterator[str]:
    for path, file in files.items():
        yield f"    {file['sha256']}  {path}, {size_text(file['num_bytes'])}"


def size_text(num_bytes: int) -> str:
    """``8.04 GB``"""
    size, unit = float(num_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.3g} {unit}"


def list_tensors(folder: Path, *, as_json: bool) -> None:
    """Every tensor of one folder in Megatron's format."""
    from copd_megatron.formats.megatron_reader import find_folder, megatron_tensors_of

    tensors = sorted(megatron_tensors_of(find_folder(folder)).items())
    if as_json:
        rows = [
            {"name": key, "shape": info.shape, "dtype": _dtype(info.dtype), "num_chunks": info.num_chunks,
             "num_bytes": info.num_bytes}
            for key, info in tensors
        ]  # fmt: skip
        print(json.dumps(rows, indent=1))
        return
    for key, info in tensors:
        shape = " x ".join(map(str, info.shape))
        print(f"{key}  [{shape}] {_dtype(info.dtype)}, {info.num_chunks} chunks")


def _dtype(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def inspect_run(options: argparse.Namespace) -> int:
    """Every checkpoint of a run directory, newest first."""
    folders = step_folders(options.path)
    if not folders:
        print(f"{options.path}: no checkpoints", file=sys.stderr)
        return 1
    return max(inspect_one(folder, options) for folder in folders.values())


def inspect_one(folder: Path, options: argparse.Namespace) -> int:
    """One joint checkpoint."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        print(f"{error}", file=sys.stderr)
        return 1
    problems = problems_of(folder, manifest, verify=options.verify, threads=options.threads)
    record = describe(folder, manifest, problems, verified=options.verify)
    print(json.dumps(record, indent=1) if options.json else "\n".join(as_text(record, files=options.files)))
    return 1 if problems else 0


def inspect_converted(folder: Path, options: argparse.Namespace) -> int:
    """A folder in Megatron's format by itself, or a branch's, without what a manifest would say."""
    from copd_megatron.formats.megatron_reader import find_folder

    folder = find_folder(folder)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    record: dict[str, Any] = {
        "folder": str(folder),
        "num_files": len(paths),
        "num_bytes": sum(path.stat().st_size for path in paths),
        "tensors": tensor_totals(folder),
    }
    if options.files:
        record["files"] = {
            str(path.relative_to(folder)): {"num_bytes": path.stat().st_size, "sha256": hash_file(path)}
            for path in paths
        }
    if options.json:
        print(json.dumps(record, indent=1))
        return 0
    print(f"{folder}: {record['num_files']} files, {size_text(record['num_bytes'])}")
    for label, total in record["tensors"].items():
        print(f"    {label}: {total['num_tensors']} tensors, {size_text(total['num_bytes'])}")
    for line in _file_lines(record.get("files", {})):
        print(line)
    return 0


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        if options.tensors:
            list_tensors(options.path, as_json=options.json)
            return 0
        if (options.path / "checkpoints").is_dir():
            return inspect_run(options)
        if (options.path / MANIFEST).is_file() or options.path.name.startswith("step_"):
            return inspect_one(options.path, options)
        return inspect_converted(options.path, options)
    except (CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
