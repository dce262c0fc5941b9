"""A merge recipe from the flags of a command line. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from copd_megatron.checkpoint.manifest import MANIFEST, read_manifest
from copd_megatron.errors import ConfigError
from copd_megatron.merge.recipe import ALIASES, METHODS, WITHOUT_BASE, MergeRecipe, ModelInput, read_recipe

_NEEDS_BASE = set(METHODS) - WITHOUT_BASE


@dataclass(frozen=True, kw_only=True)
class MergeFlags:
    """What to merge and how, as the command line gives it; None or empty: not given."""

    models: tuple[str, ...]
    """Model folders, a joint checkpoint for its trained branches, or one YAML recipe."""
    method: str | None = None
    """One of ``METHODS`` or ``ALIASES``."""
    base: str | None = None
    weights: tuple[str, ...] = ()
    """``[PATTERN=]W,W,...`` each."""
    density: tuple[str, ...] = ()
    """``[PATTERN=]D[,D,...]`` each."""
    scale: float | None = None
    """``--lambda``"""
    t: float | None = None
    normalize: bool | None = None
    rescale: bool | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: str = "base"
    seed: int | None = None
    verify: bool = False


def recipe_from(flags: MergeFlags) -> MergeRecipe:
    """The merge recipe that the flags describe, or the file that they name.

    Raises:
        ConfigError: flags that contradict each other or the recipe's file.
        FileNotFoundError, CheckpointError: a model that cannot be read.
    """
    if len(flags.models) == 1 and flags.models[0].endswith((".yaml", ".yml")):
        recipe = _from_file(flags)
    else:
        recipe = _from_flags(flags)
    if flags.seed is not None and not recipe.method.startswith("dare"):
        raise ConfigError(
            f"merge: --seed: {recipe.method} draws nothing at random; leave it out, or choose dare_linear or "
            "dare_ties"
        )
    if flags.verify and not any(_is_in_joint_checkpoint(path) for path in recipe.inputs):
        raise ConfigError(
            "merge: --verify compares joint checkpoints with their recorded digests, and no input is one; "
            "leave it out"
        )
    return recipe


def refuse_unread_base(flags: MergeFlags, recipe: MergeRecipe) -> None:
    """Raises ConfigError if the base that was given decides nothing: neither the merge reads it nor a
    report."""
    if flags.base is None or recipe.base == flags.base:
        return
    if recipe.origin != "merge":
        raise ConfigError(f"merge: --base: the recipe {recipe.origin} says what the base is; change it there")
    raise ConfigError(
        f"merge: --base: {recipe.method} takes the models alone and would not read {flags.base}; leave it "
        "out, name it among the models, choose a --method that starts from a base, or ask for a --report"
    )


def _from_flags(flags: MergeFlags) -> MergeRecipe:
    method = ALIASES.get(flags.method or "mean", flags.method or "mean")
    models = [branch for path in flags.models for branch in _branches_of(path)]
    base = flags.base
    if method == "slerp" and base is None and len(models) == 2:
        base, models = models[0], models[1:]
    if method in _NEEDS_BASE and base is None:
        raise ConfigError(f"merge: --method {method} needs --base, the model that the branches started from")
    if flags.method == "weighted" and not flags.weights:
        raise ConfigError("merge: --method weighted needs --weights, one per model")
    return MergeRecipe(
        method=method,
        models=tuple(
            ModelInput(path=path, parameters=parameters)
            for path, parameters in zip(models, _of_each_model(flags, method, len(models)), strict=True)
        ),
        base=base if method not in WITHOUT_BASE else None,
        parameters=_of_all_models(flags, method),
        dtype=flags.dtype,
        out_dtype=flags.out_dtype,
        tokenizer_source=flags.tokenizer_source,
        seed=flags.seed or 0,
    )


def _from_file(flags: MergeFlags) -> MergeRecipe:
    """A YAML merge recipe, beside which no flag may say how to merge."""
    given = {
        "--method": flags.method,
        "--weights": flags.weights or None,
        "--density": flags.density or None,
        "--lambda": flags.scale,
        "--t": flags.t,
        "--normalize": flags.normalize,
        "--rescale": flags.rescale,
        "--dtype": flags.dtype,
        "--out-dtype": flags.out_dtype,
        "--tokenizer-source": None if flags.tokenizer_source == "base" else flags.tokenizer_source,
    }
    if clash := [flag for flag, value in given.items() if value is not None]:
        raise ConfigError(
            f"merge: {', '.join(clash)}: the recipe {flags.models[0]} says how to merge; change it there"
        )
    return read_recipe(flags.models[0], seed=flags.seed or 0)


def _of_all_models(flags: MergeFlags, method: str) -> dict[str, Any]:
    """Parameters of the merge as a whole."""
    given = {"lambda": flags.scale, "t": flags.t, "normalize": flags.normalize, "rescale": flags.rescale}
    if method == "slerp" and flags.t is None:
        given["t"] = 0.5
    return {key: value for key, value in given.items() if value is not None}


def _of_each_model(flags: MergeFlags, method: str, count: int) -> list[dict[str, Any]]:
    """Parameters of each of ``count`` models."""
    each: list[dict[str, Any]] = [{} for _ in range(count)]
    weighted = "weight" in METHODS[method]["model"]
    if flags.weights and not weighted:
        instead = "--t instead, the way from the first model to the second" if method == "slerp" else "none"
        raise ConfigError(f"merge: --weights: {method} takes {instead}")
    if flags.weights:
        _spread("weight", _per_model("--weights", flags.weights, count), each)
    elif weighted:
        # The uniform mean, or its like: task vectors are summed unless the method divides by the weights.
        divides = method in ("linear", "ties") if flags.normalize is None else flags.normalize
        for parameters in each:
            parameters["weight"] = 1.0 if divides else 1.0 / count
    _spread("density", _per_model("--density", flags.density, count), each)
    return each


def _branches_of(path: str) -> list[str]:
    """The trained branches of a joint checkpoint; any other path as it is."""
    if not (Path(path) / MANIFEST).is_file():
        return [path]
    branches = read_manifest(Path(path)).branches
    return [str(Path(path) / name) for name, entry in branches.items() if not entry.frozen]


def _is_in_joint_checkpoint(path: str) -> bool:
    return (Path(path) / MANIFEST).is_file() or (Path(path).parent / MANIFEST).is_file()


def _per_model(flag: str, texts: Sequence[str], count: int) -> list[tuple[str | None, list[float]]]:
    """``[PATTERN=]v,v,...`` as pattern and values, one value per model."""
    found = []
    for text in texts:
        pattern, _, numbers = text.rpartition("=")
        try:
            values = [float(number) for number in numbers.split(",")]
        except ValueError as error:
            raise ConfigError(
                f"merge: {flag} {text}: {numbers!r} is not a list of numbers; write 0.5,0.5"
            ) from error
        if len(values) == 1 and flag == "--density":
            values *= count
        if len(values) != count:
            raise ConfigError(f"merge: {flag} {text}: {len(values)} numbers for {count} models")
        found.append((pattern or None, values))
    return found


def _spread(
    key: str, entries: Sequence[tuple[str | None, list[float]]], per_model: Sequence[dict[str, Any]]
) -> None:
    """Gives each model its column of the entries, as filters."""
    for index, parameters in enumerate(per_model):
        if entries:
            parameters[key] = [{"filter": pattern, "value": values[index]} for pattern, values in entries]
