"""The models that a configuration names, read without their weights: their sizes, and their tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from copd_megatron.config.schema import Config
from copd_megatron.errors import ConfigError
from copd_megatron.hf.companions import read_json
from copd_megatron.hf.model_config import read_model_shape, read_sizes
from copd_megatron.hf.tokens import check_files, token_ids
from copd_megatron.model.known import KNOWN, known_shape
from copd_megatron.model.shape import ModelShape


def read_model_shapes(config: Config) -> dict[str, ModelShape]:
    """The shape of each branch's starting model, by branch name; each folder is read once.

    Raises:
        ConfigError: as :func:`read_model_shape`.
    """
    read: dict[str, ModelShape] = {}
    shapes = {}
    for name, branch in config.branches.items():
        folder = branch.model_path or config.model.path
        if folder not in read:
            key = f"branches.{name}.model_path" if branch.model_path else "model.path"
            read[folder] = read_model_shape(folder, key)
        shapes[name] = read[folder]
    return shapes


def read_model_sizes(config: Config) -> dict[str, ModelShape]:
    """The shape of each branch's model without its weights: from the folder's ``config.json``, or, where
    there is no folder, of the published model that its name stands for.

    Raises:
        ConfigError: neither a config.json nor a known name.
    """
    shapes = {}
    for name, branch in config.branches.items():
        folder = branch.model_path or config.model.path
        key = f"branches.{name}.model_path" if branch.model_path else "model.path"
        known = known_shape(folder)
        if known is not None and not (Path(folder).expanduser() / "config.json").is_file():
            shapes[name] = known
        elif Path(folder).expanduser().is_dir():
            shapes[name] = read_sizes(Path(folder).expanduser(), key)
        else:
            raise ConfigError(
                f"{key}: {folder}: no such folder, and no model whose sizes are known "
                f"({', '.join(KNOWN)}); a folder with the model's config.json is enough for a plan"
            )
    return shapes


_PROCESSORS = {"image": "preprocessor_config.json", "video": "video_preprocessor_config.json"}


def check_processors(config: Config, shapes: Mapping[str, ModelShape]) -> None:
    """Whether the bounds of ``media`` and those of each vision model's processor leave a size between them.

    Raises:
        ConfigError: a smallest size is above the largest.
    """
    for name, shape in shapes.items():
        folder = Path(config.branches[name].model_path or config.model.path)
        for kind, file in _PROCESSORS.items() if shape.vision is not None else ():
            size = (read_json(folder, file) or {}).get("size")
            least, most = (
                getattr(config.media, f"{kind}_min_pixels"),
                getattr(config.media, f"{kind}_max_pixels"),
            )
            own = size if isinstance(size, dict) else {}
            least = own.get("shortest_edge") if least is None else least
            most = own.get("longest_edge") if most is None else most
            if isinstance(least, int) and isinstance(most, int) and least > most:
                raise ConfigError(
                    f"media: {kind}s are to have at least {least} pixels and at most {most}, counting what "
                    f"{folder / file} says where a bound is null; set both media.{kind}_min_pixels and "
                    f"media.{kind}_max_pixels"
                )


def check_tokenizer(folder: str | Path) -> None:
    """Whether the tokenizer of a model folder can be loaded, as far as its files say.

    Raises:
        ConfigError: with the file.
    """
    try:
        check_files(Path(folder).expanduser())
    except (OSError, ValueError) as error:
        raise ConfigError(f"the model's tokenizer: {error}") from error


def check_tokenizers(config: Config) -> None:
    """Whether the tokenizers can be loaded, and a token id means the same to all branches, which exchange
    ids. A token that only one model has is no contradiction: models of a family add tokens of their own to a
    common vocabulary.

    Raises:
        ConfigError: two models have the same id for different tokens, or a tokenizer is damaged.
    """
    folders: dict[str, str] = {}
    for name, branch in config.branches.items():
        folders.setdefault(branch.model_path or config.model.path, name)
    for folder in folders:
        check_tokenizer(folder)
    if len(folders) < 2:
        return
    known: dict[str, dict[int, str]] = {}
    for folder, name in folders.items():
        try:
            tokens = token_ids(Path(folder))
        except ValueError as error:
            raise ConfigError(str(error)) from None
        if tokens is not None:
            known[name] = {number: token for token, number in tokens.items()}
    (first, ours), *others = known.items() or [("", {})]
    for name, theirs in others:
        differ = [number for number in sorted(ours.keys() & theirs.keys()) if ours[number] != theirs[number]]
        if differ:
            number = differ[0]
            raise ConfigError(
                f"branches.{name}.model_path: {len(differ)} token ids mean something else than in branch "
                f"{first}'s model, {number} for one: {theirs[number]!r} and {ours[number]!r}; branches "
                "exchange token ids, so use models of one tokenizer"
            )
