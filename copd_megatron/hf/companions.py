"""The files beside a Hugging Face folder's tensors: index, configuration, tokenizer. Imports no torch."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

from copd_megatron.untrusted.json_text import load
from copd_megatron.untrusted.regular_file import open_regular, read_regular
from copd_megatron.untrusted.whole_file import replacing

logger = logging.getLogger(__name__)

WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
MAX_SMALL_BYTES: Final = 256 << 20
"""Of a file beside the weights."""
_TEMPLATE: Final = "chat_template.jinja"
_SUFFIXES = {".json", ".txt", ".jinja", ".model"}


# ---- which files hold the weights ------------------------------------------------------------------------


def shard_name(number: int, count: int) -> str:
    """Hugging Face's file name of shard ``number`` (from 1)."""
    return WEIGHTS if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up a folder's model, as transformers and vLLM choose them: those that
    the index names, else ``model.safetensors``, else the only one there is. Others are left alone, with a
    warning.

    Raises:
        FileNotFoundError: there are none, or the index names one that is not there.
        ValueError: the index is damaged, or it is not clear which files count.
    """
    present = sorted(path.name for path in folder.glob("*.safetensors"))
    where = read_index(folder)
    if where is not None:
        named = sorted(set(where.values()))
        if absent := [name for name in named if not (folder / name).is_file()]:
            raise FileNotFoundError(
                f"{folder}: {len(absent)} weight file(s) of {INDEX} are missing, {absent[0]} the first; "
                "copy the model again"
            )
        if WEIGHTS in present and WEIGHTS not in named:
            raise ValueError(
                f"{folder} holds two models: {WEIGHTS}, which transformers loads, and the files of {INDEX}, "
                "which vLLM loads; remove the one that is out of date"
            )
    elif WEIGHTS in present:
        named = [WEIGHTS]
    elif len(present) > 1:
        raise ValueError(
            f"{folder} holds {len(present)} safetensors files and no {INDEX} that says which of them count; "
            "copy the model again"
        )
    else:
        named = present
    if not named:
        raise FileNotFoundError(
            f"{folder} has no {WEIGHTS} and no {INDEX}; other weight formats are not read: save the model "
            "again with save_pretrained, which writes safetensors"
        )
    if stray := sorted(set(present) - set(named)):
        _warn_of_strays(folder, tuple(stray))
    return [folder / name for name in named]


@cache
def _warn_of_strays(folder: Path, names: tuple[str, ...]) -> None:
    """Once per folder: it is opened several times in a job."""
    logger.warning("%s: %s not part of the model, and left out", folder, ", ".join(names))


def read_index(folder: Path) -> dict[str, str] | None:
    """Tensor name to the file that holds it, as the index says; None: the folder has no index.

    Raises:
        ValueError: the index is damaged.
    """
    index = read_json(folder, INDEX)
    if index is None:
        return None
    where = index.get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ValueError(f"{folder / INDEX} has no weight_map; copy the model again")
    for name, file in where.items():
        if not is_plain_name(file):
            raise ValueError(f"{folder / INDEX}: {name} is said to be in {file!r}, which is no file name")
    return where


def is_plain_name(file: Any) -> bool:
    """A safetensors file's name, and nothing that leads out of a folder."""
    return isinstance(file, str) and file == Path(file).name and file.endswith(".safetensors")


def write_index(folder: Path, where: Mapping[str, str], total_bytes: int) -> None:
    """Writes the index over several files; a single one of the usual name needs none.

    Args:
        where: tensor name to file name.
        total_bytes: of all tensors.
    """
    if set(where.values()) != {WEIGHTS}:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(where.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


# ---- the other files -------------------------------------------------------------------------------------


def chat_template(folder: Path) -> str | None:
    """The folder's chat template, wherever it stands; None: it has none.

    Raises:
        ValueError, OSError: the file cannot be read.
    """
    plain = folder / _TEMPLATE
    if plain.is_file():
        return read_regular(plain, MAX_SMALL_BYTES).decode("utf-8", "replace")
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = (read_json(folder, name) or {}).get("chat_template")
        if isinstance(found, str):
            return found
    return None


def copy_companions(source: Path, target: Path) -> None:
    """Copies everything but the weights: configuration, tokenizer, processor, template.

    What is written is published, and a received folder may hold links to private files of the reader's.

    Raises:
        OSError: a file is a link out of the folder (of Hugging Face's cache, out of the model's part of it),
            or too large.
    """
    for path in companion_files(source):
        read = open_regular(path, max_bytes=MAX_SMALL_BYTES, inside=_whole_of(source))
        with read as file, replacing(target / path.name) as copy:
            shutil.copyfileobj(file, copy)


def _whole_of(folder: Path) -> Path:
    """The folder, or what it is a part of in Hugging Face's cache, whose snapshots are links to blobs."""
    snapshots = folder.resolve().parent
    is_cached = snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--")
    return snapshots.parent if is_cached else folder


def companion_files(folder: Path) -> list[Path]:
    """Configuration, tokenizer, processor and template of a folder, by name."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix in _SUFFIXES and path.name != INDEX
    ]


def set_dtype(folder: Path, dtype: str) -> None:
    """Makes config.json, if there is one, say which type the weights have; leaves the file alone if it
    says so already."""
    config = read_json(folder, "config.json")
    if config is not None and config.get("dtype", config.get("torch_dtype")) != dtype:
        config.pop("torch_dtype", None)
        text = json.dumps({**config, "dtype": dtype}, indent=2) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")


def read_json(folder: Path | None, name: str) -> dict[str, Any] | None:
    """A JSON object in a file of the folder; None where there is no such file.

    Raises:
        ValueError: the file does not hold a JSON object.
    """
    if folder is None or not (folder / name).is_file():
        return None
    try:
        found = load(read_regular(folder / name, MAX_SMALL_BYTES), max_bytes=MAX_SMALL_BYTES)
    except ValueError as error:
        raise ValueError(f"{folder / name}: not valid JSON ({error}); copy it again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{folder / name} holds a {type(found).__name__}, expected an object; copy it again")
    return found
