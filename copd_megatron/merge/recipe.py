"""What to merge and how: a recipe in mergekit's manner, from YAML or from plain flags. Imports no torch.

    merge_method: ties
    base_model: runs/base
    models:
      - model: runs/export/text
        parameters:
          weight: 0.5
          density:
            - filter: mlp
              value: 0.7
            - value: 0.5
      - model: runs/export/image
        parameters:
          weight: [0.2, 0.8]       # from the first layer to the last
    parameters:
      density: 0.5
      normalize: true
    dtype: float32
    out_dtype: bfloat16

A model's own parameters take precedence over the common ones; ``parameters`` says what a value can be.
``dtype`` is the type that inputs are cast to before merging (null: their own), ``out_dtype`` that of the
result (null: ``dtype``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from copd_megatron.config.typecheck import join, unknown_key
from copd_megatron.errors import ConfigError
from copd_megatron.merge.parameters import Scalar, check_setting, evaluate, is_scalar, unused_filters
from copd_megatron.untrusted.regular_file import read_regular
from copd_megatron.untrusted.yaml_text import load_yaml

METHODS: dict[str, dict[str, set[str]]] = {
    "linear": {"model": {"weight"}, "shared": {"normalize"}},
    "task_arithmetic": {"model": {"weight"}, "shared": {"normalize", "lambda"}},
    "ties": {"model": {"weight", "density"}, "shared": {"normalize", "rescale", "lambda", "int8_mask"}},
    "dare_linear": {"model": {"weight", "density"}, "shared": {"normalize", "rescale", "lambda"}},
    "dare_ties": {"model": {"weight", "density"}, "shared": {"normalize", "rescale", "lambda", "int8_mask"}},
    "slerp": {"model": set(), "shared": {"t"}},
    "passthrough": {"model": set(), "shared": set()},
}
"""Parameters of each method: those that each model may set for itself, and those of the merge as a whole.
``int8_mask`` only saves mergekit memory; it is accepted and changes nothing."""

ALIASES = {"mean": "linear", "weighted": "linear"}
WITHOUT_BASE = {"linear", "passthrough"}
"""Methods that know no base."""

_DEFAULTS: dict[str, dict[str, Scalar]] = {
    "linear": {"normalize": True},
    "task_arithmetic": {"normalize": False, "lambda": 1.0},
    "ties": {"normalize": True, "rescale": False, "lambda": 1.0, "density": 1.0},
    "dare_linear": {"normalize": False, "rescale": True, "lambda": 1.0, "density": 1.0},
    "dare_ties": {"normalize": False, "rescale": True, "lambda": 1.0, "density": 1.0},
    "slerp": {},
    "passthrough": {},
}

_MAX_BYTES = 16 << 20
_TOP_KEYS = ("merge_method", "base_model", "models", "parameters", "dtype", "out_dtype", "tokenizer_source")
_ELSEWHERE = {
    "slices": "all layers are merged, none are rearranged",
    "modules": "all modules are merged alike; use filters",
    "tokenizer": "the inputs' tokenizers must be the same; use tokenizer_source to say whose files to copy",
    "chat_template": "the template of tokenizer_source is copied",
}
_DTYPES = ("float64", "float32", "float16", "bfloat16")
_LAYER = re.compile(r"^(.*?(?:layers|blocks|h)\.)(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class ModelInput:
    """One model and its own parameters."""

    path: str
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TensorParameters:
    """A recipe's parameters for one tensor, resolved."""

    weights: tuple[float, ...]
    densities: tuple[float, ...]
    shared: Mapping[str, Scalar]


@dataclass(frozen=True, kw_only=True)
class MergeRecipe:
    """A merge, checked as far as possible without opening the models."""

    method: str
    models: tuple[ModelInput, ...]
    """Without the base, but for ``linear``, which knows none."""
    base: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    """``first``: that of each tensor in the first input."""
    tokenizer_source: str = "base"
    seed: int = 0
    """Root of DARE's random masks."""
    arithmetic: Literal["float32", "float64"] | None = None
    """Type to compute in; None: chosen by ``methods``."""
    origin: str = "merge"
    """What messages call the recipe: a file or ``merge``."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise unknown_key(self.origin, f"merge_method.{self.method}", [*METHODS, *ALIASES])
        if self.method in WITHOUT_BASE and self.base is not None:
            raise ConfigError(
                f"{self.origin}: base_model: {self.method} takes the models listed and knows no base; list "
                "it under models if it is to count, or leave it out (--report takes --base by itself)"
            )
        if self.method not in WITHOUT_BASE and self.base is None:
            raise ConfigError(
                f"{self.origin}: base_model: {self.method} needs one; give the model all started from"
            )
        if self.method == "slerp" and len(self.models) != 1:
            raise ConfigError(
                f"{self.origin}: models: slerp goes from base_model to one other model, here are "
                f"{len(self.models)}; use linear or ties for more"
            )
        if self.method == "passthrough" and len(self.models) > 1:
            raise ConfigError(
                f"{self.origin}: models: passthrough copies one model, here are {len(self.models)}; use "
                "linear for their mean"
            )
        if not self.models:
            raise ConfigError(f"{self.origin}: models: there is nothing to merge")
        for key, value in (("dtype", self.dtype), ("out_dtype", self.out_dtype)):
            if value is not None and value not in _DTYPES and (key, value) != ("out_dtype", "first"):
                raise ConfigError(f"{self.origin}: {key}: {value!r} is none of {', '.join(_DTYPES)}")
        self._check_parameters()

    def _check_parameters(self) -> None:
        known = METHODS[self.method]
        for key, value in self.parameters.items():
            if key not in known["model"] | known["shared"]:
                raise unknown_key(self.origin, f"parameters.{key}", known["model"] | known["shared"])
            check_setting(key, value, f"{self.origin}: parameters.{key}")
        for number, model in enumerate(self.models):
            for key, value in model.parameters.items():
                where = f"models[{number}].parameters.{key}"
                if key in known["shared"]:
                    raise ConfigError(
                        f"{self.origin}: {where}: {key} belongs to the merge as a whole; "
                        "move it to parameters"
                    )
                if key not in known["model"]:
                    raise unknown_key(self.origin, where, known["model"])
                check_setting(key, value, f"{self.origin}: {where}")

    @property
    def inputs(self) -> tuple[str, ...]:
        """Paths of what is read: the base first where there is one."""
        models = tuple(model.path for model in self.models)
        return models if self.base is None else (self.base, *models)

    @property
    def copies(self) -> bool:
        """Whether the result is one model as it is."""
        return self.method == "passthrough"

    def remarks(self) -> list[str]:
        """What a user may not expect of the result, one sentence each."""
        found = []
        if len(self.models) == 1 and self.method not in ("slerp", "passthrough"):
            found.append(f"{self.models[0].path} is the only model: there is nothing to merge it with")
        paths = [_same_path(path) for path in self.inputs]
        for path in dict.fromkeys(path for path in paths if paths.count(path) > 1):
            is_base = self.base is not None and path == paths[0]
            what = "is the base too, from which it has not moved" if is_base else "counts as often"
            found.append(f"{path} is given {paths.count(path)} times, and {what}")
        for key in ("density", "weight"):
            given = [model.parameters.get(key, self.parameters.get(key)) for model in self.models]
            for model, value in zip(self.models, given, strict=True):
                if is_scalar(value) and float(value) == 0:
                    found.append(f"the {key} of {model.path} is 0: nothing of it gets into the result")
        return found

    def unused_filters(self, names: Sequence[str]) -> list[str]:
        """Filters that decide nothing in a model of these tensors, one sentence each."""
        scopes = [self.parameters, *(model.parameters for model in self.models)]
        found = [
            f"the {key} for {pattern} has no effect: it {why}"
            for scope in scopes
            for key, setting in scope.items()
            for pattern, why in unused_filters(setting, names)
        ]
        return list(dict.fromkeys(found))

    def companion_index(self) -> int:
        """Which of ``inputs`` gives configuration, tokenizer and processor files.

        Raises:
            ConfigError: ``tokenizer_source`` is none of them.
        """
        if self.tokenizer_source in ("base", "union"):  # all tokenizers are the same
            return 0
        paths = [_same_path(path) for path in self.inputs]
        if _same_path(self.tokenizer_source) not in paths:
            raise ConfigError(
                f"{self.origin}: tokenizer_source: {self.tokenizer_source} is none of the inputs; give base "
                f"or one of {', '.join(self.inputs)}"
            )
        return paths.index(_same_path(self.tokenizer_source))

    def resolve(self, name: str, depth: float) -> TensorParameters:
        """Parameters for the tensor ``name``, whose layer lies at ``depth`` (0 first .. 1 last).

        Raises:
            ConfigError: a required parameter has no value for this tensor.
        """
        known, defaults = METHODS[self.method], _DEFAULTS[self.method]

        def find(key: str, *scopes: Mapping[str, Any]) -> Scalar:
            for scope in scopes:
                if key in scope and (value := evaluate(scope[key], name, depth)) is not None:
                    return value
            if key in defaults:
                return defaults[key]
            raise ConfigError(
                f"{self.origin}: {self.method} needs a {key} for {name}, and no filter of it fits; add a "
                "last entry without a filter"
            )

        def each(key: str) -> tuple[float, ...]:
            if key not in known["model"]:
                return ()
            return tuple(float(find(key, model.parameters, self.parameters)) for model in self.models)

        shared = {key: find(key, self.parameters) for key in known["shared"] - {"int8_mask"}}
        weights = each("weight") or tuple(1.0 for _ in self.models)
        return TensorParameters(weights=weights, densities=each("density"), shared=shared)


def layer_depths(names: Sequence[str]) -> dict[str, float]:
    """How deep each tensor's layer lies in its tower: layer / (layers - 1); 0 outside of layers."""
    count: dict[str, int] = {}
    found = {name: match for name in names if (match := _LAYER.match(name))}
    for match in found.values():
        count[match[1]] = max(count.get(match[1], 0), int(match[2]) + 1)
    depths = dict.fromkeys(names, 0.0)
    for name, match in found.items():
        last = count[match[1]] - 1
        depths[name] = int(match[2]) / last if last else 1.0
    return depths


def layer_label(name: str) -> str:
    """The layer a tensor belongs to (``layers.3``, ``visual.blocks.0``), or its module outside of layers."""
    if match := _LAYER.match(name):
        return (match[1] + match[2]).removeprefix("model.").removeprefix("language_model.")
    parts = name.removeprefix("model.").split(".")
    return ".".join(parts[:-1] or parts)


def read_recipe(path: str | Path, *, seed: int = 0) -> MergeRecipe:
    """Reads a recipe from YAML.

    Raises:
        ConfigError: not YAML, an unknown key (with the nearest valid one), or a value that cannot be.
        FileNotFoundError: there is no such file.
    """
    origin = str(path)
    try:
        raw = load_yaml(read_regular(Path(path), _MAX_BYTES))
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{origin}: not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{origin}: a recipe is a mapping with merge_method and models")
    for key in raw:
        if key in _ELSEWHERE:
            raise ConfigError(f"{origin}: {key}: not offered here; {_ELSEWHERE[key]}")
        if key not in _TOP_KEYS:
            raise unknown_key(origin, str(key), _TOP_KEYS)
    if "merge_method" not in raw:
        raise ConfigError(f"{origin}: merge_method is missing; one of {', '.join(METHODS)}")
    method = ALIASES.get(str(raw["merge_method"]), str(raw["merge_method"]))
    base = _path_of(raw["base_model"], f"{origin}: base_model") if raw.get("base_model") else None
    models = _models(raw.get("models"), origin)
    if base is not None and method not in WITHOUT_BASE:
        # As in mergekit, the base may be listed among the models; its parameters mean nothing.
        models = [model for model in models if _same_path(model.path) != _same_path(base)]
    elif base is not None and any(_same_path(model.path) == _same_path(base) for model in models):
        base = None
    return MergeRecipe(
        method=method,
        models=tuple(models),
        base=base,
        parameters=_mapping(raw.get("parameters"), f"{origin}: parameters"),
        dtype=raw.get("dtype"),
        out_dtype=raw.get("out_dtype"),
        tokenizer_source=str(raw.get("tokenizer_source") or "base"),
        seed=seed,
        origin=origin,
    )


def _models(raw: Any, origin: str) -> list[ModelInput]:
    if not isinstance(raw, list) or not raw:
        raise ConfigError(f"{origin}: models: a list of entries with a model each is needed")
    models = []
    for number, entry in enumerate(raw):
        where = f"models[{number}]"
        if not isinstance(entry, dict):
            raise ConfigError(
                f"{origin}: {where}: a mapping with model and parameters is needed, not {entry!r}"
            )
        for key in entry:
            if key not in ("model", "parameters"):
                raise unknown_key(origin, join(where, str(key)), ("model", "parameters"))
        if not entry.get("model"):
            raise ConfigError(f"{origin}: {where}.model is missing; give a folder")
        parameters = _mapping(entry.get("parameters"), f"{origin}: {where}.parameters")
        models.append(
            ModelInput(path=_path_of(entry["model"], f"{origin}: {where}.model"), parameters=parameters)
        )
    return models


def _path_of(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{where}: a folder is needed, not {value!r}")
    return value


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: a mapping is needed, not {value!r}")
    return value


def _same_path(path: str) -> str:
    return str(Path(path).resolve())
