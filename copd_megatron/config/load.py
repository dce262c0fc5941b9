"""Reads a run's settings: YAML files and dotted overrides into :class:`~copd_megatron.config.schema.Config`.

Order of precedence, weakest first:

1. the defaults in ``schema.py``,
2. the file named by ``defaults_from:`` (its path is relative to the file that names it),
3. the YAML file,
4. overrides, in the order given.

``branch_defaults:`` fills what each branch leaves out, after all of these: an override of
``branch_defaults.num_prompts_per_step`` changes every branch that does not set it itself.
Mappings merge, lists and scalars replace. Values may use OmegaConf interpolation (``${run.seed}``).

Relative paths in ``model.path``, ``data.train`` ... are relative to the current working directory, not to
the YAML file, as paths on the command line are.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from copd_megatron.config.schema import BranchConfig, Config
from copd_megatron.config.typecheck import Field, check_value, root_field, unknown_key
from copd_megatron.errors import ConfigError

BRANCH_DEFAULTS = "branch_defaults"
DEFAULTS_FROM = "defaults_from"

_PATH_ITEM = re.compile(r"(?P<name>[^.\[\]\s]+)(?P<indices>(\[\d+\])*)")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads ``path``, applies ``key=value`` overrides, and returns the typed settings.

    Keys are dotted (``branches.text.parallel.tensor_model_parallel_size=2``); list items are reached by
    index (``opd.edges.0.beta=0.5`` or ``opd.edges[0].beta=0.5``); values are YAML (``[a, b]``, ``null``).

    Checks names and types only; ``validate`` checks what spans fields.

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
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def save_resolved(config: Config, path: str | Path) -> Path:
    """Writes ``to_yaml(config)`` to ``path`` (a file; its folder is created) and returns the path."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    partial.write_text(to_yaml(config), encoding="utf-8")
    partial.replace(target)
    return target


def _read_yaml(path: Path, visited: tuple[Path, ...]) -> dict[str, Any]:
    """The file's plain mapping, checked key by key, laid over its ``defaults_from``."""
    where = path.resolve()
    if where in visited:
        chain = " -> ".join(str(p) for p in (*visited, where))
        raise ConfigError(f"{path}: {DEFAULTS_FROM} goes in a circle: {chain}")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"configuration file {path} does not exist (working from {Path.cwd()})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration file {path} cannot be read: {error}") from error
    raw = _parse_yaml(text, path)
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping of settings at the top, got a {type(raw).__name__}")
    schema = root_field(Config, extra={BRANCH_DEFAULTS: BranchConfig, DEFAULTS_FROM: str})
    settings: dict[str, Any] = check_value(raw, schema, origin=str(path))
    parent = settings.pop(DEFAULTS_FROM, None)
    if parent is None:
        return settings
    parent_path = path.parent / Path(parent).expanduser()
    if not parent_path.is_file():
        raise ConfigError(f"{path}: {DEFAULTS_FROM}: {parent}: {parent_path} does not exist")
    merged: dict[str, Any] = _overlay(_read_yaml(parent_path, (*visited, where)), settings)
    return merged


def _parse_yaml(text: str, path: Path) -> Any:
    """YAML as OmegaConf reads it (``1e-6`` is a number, duplicate keys are refused), as plain containers."""
    try:
        return OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{path}{line}: not valid YAML: {problem}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {_first_line(error)}") from error
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply to be a configuration; is it the right file?") from None


def _parse_override(override: str) -> tuple[list[str | int], Any]:
    """``a.b[0].c=value`` to its path and its value."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError(f"override {override!r}: expected key=value, such as schedule.cycles=2")
    parts: list[str | int] = []
    for item in key.split("."):
        match = _PATH_ITEM.fullmatch(item)
        if match is None:
            raise ConfigError(f"override {override!r}: {key!r} is not a dotted key such as opd.edges[0].beta")
        parts.append(int(item) if item.isdigit() else match["name"])
        parts.extend(int(index) for index in re.findall(r"\d+", match["indices"]))
    try:
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, RecursionError) as error:
        raise ConfigError(f"override {override!r}: value is not valid YAML: {_first_line(error)}") from error
    assert isinstance(parsed, dict)
    return parts, parsed["value"]


def _apply_override(raw: dict[str, Any], override: str, schema: Field) -> None:
    """Checks one override against the schema and sets it in ``raw``, in place."""
    parts, value = _parse_override(override)
    origin = f"override {override!r}"
    place = schema
    node: Any = raw
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        key: str | int = str(part) if isinstance(node, dict) else part
        container, place = place, place.child(key, origin=origin)
        if isinstance(node, list):
            if not isinstance(key, int) or key >= len(node):
                raise ConfigError(f"{origin}: {place.path} does not exist, the list has {len(node)} item(s)")
        elif container.is_mapping and key not in node and not last:
            # A misspelt branch name must not become one more branch.
            raise unknown_key(origin, place.path, candidates=list(node))
        if last:
            value = check_value(_as_typed(value, override, place), place, origin=origin)
            present = node.get(key) if isinstance(node, dict) else node[key]
            node[key] = _overlay(present, value)
            return
        if isinstance(node, dict) and node.get(key) is None:
            node[key] = [] if place.is_list else {}
        node = node[key]
        if not isinstance(node, dict | list):
            raise ConfigError(f"{origin}: {place.path} is {node!r} here and has no keys of its own")


def _as_typed(value: Any, override: str, place: Field) -> Any:
    """What the person typed, where YAML would make something else of it: text stays text, 012 is no octal."""
    text = override.partition("=")[2].strip()
    if place.hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return text
    if place.hint is int and re.fullmatch(r"[-+]?0[0-9_]+", text):
        raise ConfigError(
            f"override {override!r}: {place.path}: {text} would be read as an octal number; write it without "
            "the leading 0"
        )
    return value


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
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(settings))
        OmegaConf.resolve(merged)
        config = OmegaConf.to_object(merged)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{origin}: {error.full_key} has no default and is not set") from error
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if error.full_key else ""
        raise ConfigError(f"{origin}: {key}{_first_line(error)}") from error
    assert isinstance(config, Config)
    _expand_home(config)
    return config


def _expand_home(config: Config) -> None:
    """``~`` at the start of a path is the home folder, as in a shell."""

    def expanded(path: str | None) -> str | None:
        return str(Path(path).expanduser()) if path is not None and path.startswith("~") else path

    config.run.dir = expanded(config.run.dir)
    config.model.path = expanded(config.model.path) or ""
    config.logging.prometheus.textfile = expanded(config.logging.prometheus.textfile)
    for branch in config.branches.values():
        branch.model_path = expanded(branch.model_path)
        for shards in (branch.data.train, branch.data.validation):
            shards[:] = [expanded(pattern) or "" for pattern in shards]


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
