"""Reads a run's settings: YAML files and dotted overrides into :class:`~copd_megatron.config.schema.Config`.

Order of precedence, weakest first:

1. the defaults in ``schema.py``,
2. the file named by ``defaults_from:`` (its path is relative to the file that names it),
3. the YAML file,
4. overrides, in the order given.

``branch_defaults:`` fills what each branch leaves out, after all of these: an override of
``branch_defaults.num_prompts_per_step`` changes every branch that does not set it itself.
Mappings merge, lists and scalars replace. Values may use OmegaConf interpolation (``${run.seed}``). A scalar
is what its setting's type says: ``run.name: 07`` is the text 07, ``run.seed: 012`` the number twelve.

Relative paths in ``model.path``, ``data.train`` ... are relative to the current working directory, not to
the YAML file, as paths on the command line are. ``~`` at their start is the home folder.
"""

from __future__ import annotations

import copy
import os
import re
import reprlib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from copd_megatron.config.bounds import FilePath, annotated_hints, limits_of
from copd_megatron.config.interpolation import check_interpolations
from copd_megatron.config.scalars import Scalar, parse_yaml
from copd_megatron.config.schema import BranchConfig, Config
from copd_megatron.config.typecheck import Field, check_value, root_field, unknown_key
from copd_megatron.errors import ConfigError
from copd_megatron.untrusted.regular_file import read_regular
from copd_megatron.untrusted.whole_file import write_whole

BRANCH_DEFAULTS = "branch_defaults"
DEFAULTS_FROM = "defaults_from"

_MAX_BYTES = 16 << 20
_PATH_ITEM = re.compile(r"(?P<name>[^.\[\]\s]+)(?P<indices>(\[\d+\])*)")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads ``path``, applies ``key=value`` overrides, and returns the typed settings.

    Keys are dotted (``branches.text.parallel.tensor_model_parallel_size=2``); list items are reached by
    index (``opd.edges.0.beta=0.5`` or ``opd.edges[0].beta=0.5``). Values are YAML (``[a, b]``, ``null``), but
    the value of a text setting is the text itself, unless it is in quotes.

    Checks names and types only; ``validate`` checks the rest.

    Raises:
        ConfigError: unreadable file, YAML syntax, unknown key, value of a wrong type, missing value.
    """
    raw = _read_yaml(Path(path), visited=())
    schema = root_field(Config, extra={BRANCH_DEFAULTS: BranchConfig})
    for override in overrides:
        _apply_override(raw, override, schema)
    return _build(raw, origin=str(path))


def to_yaml(config: Config) -> str:
    """The settings as YAML that ``load_config`` reads back to an equal ``Config``."""
    return OmegaConf.to_yaml(OmegaConf.create(plain(config)))


def save_resolved(config: Config, path: str | Path) -> Path:
    """Writes ``to_yaml(config)`` to ``path`` (a file; its folder is created) and returns the path."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, to_yaml(config))
    return target


def _read_yaml(path: Path, visited: tuple[Path, ...]) -> dict[str, Any]:
    """The file's plain mapping, checked key by key, laid over its ``defaults_from``."""
    where = path.resolve()
    if where in visited:
        chain = " -> ".join(str(p) for p in (*visited, where))
        raise ConfigError(f"{path}: {DEFAULTS_FROM} goes in a circle: {chain}")
    try:
        text = read_regular(path, _MAX_BYTES).decode("utf-8").replace("\r\n", "\n")
    except FileNotFoundError:
        raise ConfigError(f"configuration file {path} does not exist (working from {Path.cwd()})") from None
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ConfigError(
            f"configuration file {path} cannot be read: byte {byte:#x} at position {error.start} is not "
            "UTF-8; save it as UTF-8 text"
        ) from error
    except OSError as error:
        raise ConfigError(f"configuration file {path} cannot be read: {error.strerror}") from error
    try:
        raw = _parse_file(text, path)
        if not isinstance(raw, dict | None):
            raise ConfigError(f"{path}: expected a mapping of settings at the top, got {reprlib.repr(raw)}")
        schema = root_field(Config, extra={BRANCH_DEFAULTS: BranchConfig, DEFAULTS_FROM: str})
        settings: dict[str, Any] = check_value(raw, schema, origin=str(path))
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply to be a configuration; is it the right file?") from None
    parent = settings.pop(DEFAULTS_FROM, None)
    if parent is None:
        return settings
    parent_path = path.parent / Path(parent).expanduser()
    if not parent_path.is_file():
        raise ConfigError(f"{path}: {DEFAULTS_FROM}: {parent}: {parent_path} does not exist")
    merged: dict[str, Any] = _overlay(_read_yaml(parent_path, (*visited, where)), settings)
    return merged


def _parse_file(text: str, path: Path) -> Any:
    try:
        return parse_yaml(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {_problem(error)}") from error


def _split_override(override: str) -> tuple[list[str], str]:
    """``a.b[0].c=value`` to the parts of its key, ``a``, ``b``, ``0``, ``c``, and its value."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError(f"override {override!r}: expected key=value, such as schedule.cycles=2")
    parts: list[str] = []
    for item in key.split("."):
        match = _PATH_ITEM.fullmatch(item)
        if match is None:
            raise ConfigError(f"override {override!r}: {key!r} is not a dotted key such as opd.edges[0].beta")
        parts.append(match["name"])
        parts.extend(re.findall(r"\d+", match["indices"]))
    return parts, text.strip()


def _apply_override(raw: dict[str, Any], override: str, schema: Field) -> None:
    """Checks one override against the schema and sets it in ``raw``, in place."""
    parts, text = _split_override(override)
    origin = f"override {override!r}"
    place = schema
    node: Any = raw
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        key: str | int = int(part) if isinstance(node, list) and part.isdigit() else part
        container, place = place, place.child(key, origin=origin)
        if isinstance(node, list):
            if not isinstance(key, int) or key >= len(node):
                raise ConfigError(f"{origin}: {place.path} does not exist, the list has {len(node)} item(s)")
        elif container.is_mapping and key not in node and not last:
            # A misspelt branch name must not become one more branch.
            raise unknown_key(origin, place.path, candidates=list(node))
        if last:
            value = check_value(_override_value(text, place, origin), place, origin=origin)
            present = node.get(key) if isinstance(node, dict) else node[key]
            node[key] = _overlay(present, value)
            return
        if isinstance(node, dict) and node.get(key) is None:
            node[key] = [] if place.is_list else {}
        node = node[key]
        if not isinstance(node, dict | list):
            raise ConfigError(f"{origin}: {place.path} is {node!r} here and has no keys of its own")


def _override_value(text: str, place: Field, origin: str) -> Any:
    """What was typed: for a text setting the text itself, unless it is in quotes; otherwise YAML."""
    if place.hint is str and not text.startswith(("'", '"')):
        return Scalar.of(text)
    try:
        return parse_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin}: value is not valid YAML: {_problem(error)}") from error
    except RecursionError:
        raise ConfigError(f"{origin}: value is nested too deeply to be a setting") from None


def _overlay(base: Any, top: Any) -> Any:
    """``top`` over ``base``: mappings merge, anything else replaces. Neither is changed."""
    if not isinstance(base, Mapping) or not isinstance(top, Mapping):
        return copy.deepcopy(top)
    merged = {key: copy.deepcopy(value) for key, value in base.items()}
    for key, value in top.items():
        merged[key] = _overlay(merged[key], value) if key in merged else copy.deepcopy(value)
    return merged


def _build(raw: dict[str, Any], origin: str) -> Config:
    """Branch defaults filled in, interpolations resolved, missing values refused."""
    settings = dict(raw)
    defaults = settings.pop(BRANCH_DEFAULTS, None) or {}
    branches = settings.get("branches") or {}
    settings["branches"] = {name: _overlay(defaults, branch or {}) for name, branch in branches.items()}
    check_interpolations(settings, origin)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(settings))
        config = OmegaConf.to_object(merged)  # resolves interpolations; resolve() would do so twice
    except MissingMandatoryValue as error:
        raise ConfigError(f"{origin}: {error.full_key} has no default and is not set") from error
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if error.full_key else ""
        raise ConfigError(f"{origin}: {key}{_first_line(error)}") from error
    assert isinstance(config, Config)
    _expand_home(config, Config)
    return config


def _expand_home(value: Any, hint: Any) -> Any:
    """Paths with ``~`` at their start expanded as in a shell, in ``value`` and all beneath it."""
    if is_dataclass(value):
        kind: Any = type(value)
        hints = annotated_hints(kind)
        for field in fields(value):
            setattr(value, field.name, _expand_home(getattr(value, field.name), hints[field.name]))
    elif isinstance(value, dict):
        return {name: _expand_home(item, typing.get_args(hint)[1]) for name, item in value.items()}
    elif isinstance(value, list):
        return [_expand_home(item, typing.get_args(hint)[0]) for item in value]
    elif isinstance(value, str) and any(isinstance(limit, FilePath) for limit in limits_of(hint)):
        return os.path.expanduser(value)
    return value


def plain(value: Any) -> Any:
    """Settings as plain containers that OmegaConf reads back: enums by name, ``${`` in a text escaped."""
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + "\\${", value)
    return value


def _problem(error: yaml.YAMLError) -> str:
    return getattr(error, "problem", None) or _first_line(error)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
