"""The files of a Hugging Face folder besides the tensors: configuration, tokenizer, index."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"
_COMPANION_SUFFIXES = {".json", ".txt", ".jinja", ".model"}


def write_index(folder: Path, where: Mapping[str, str], total_bytes: int) -> None:
    """The index over several shards; a single file needs none."""
    if len(set(where.values())) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(where.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def copy_companions(source: Path, target: Path) -> None:
    """Everything of a Hugging Face folder but the weights: configuration, tokenizer, processor, template."""
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix in _COMPANION_SUFFIXES and file.name != INDEX:
            shutil.copyfile(file, target / file.name)


def set_dtype(folder: Path, dtype: str) -> None:
    """Says in config.json, if there is one, which type the weights now have."""
    path = folder / "config.json"
    if path.is_file():
        config = json.loads(path.read_text())
        if config.get("dtype", config.get("torch_dtype")) != dtype:
            config["dtype"] = dtype
            config.pop("torch_dtype", None)
            path.write_text(json.dumps(config, indent=2) + "\n")


def read_json(folder: Path | None, name: str) -> dict[str, Any] | None:
    """A JSON file of the folder; None where there is none.

    Raises:
        ValueError: the file is not JSON.
    """
    if folder is None or not (folder / name).is_file():
        return None
    try:
        found: dict[str, Any] = json.loads((folder / name).read_text())
    except ValueError as error:
        raise ValueError(f"{folder / name}: not valid JSON ({error}); copy it again") from error
    return found
