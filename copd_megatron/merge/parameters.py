"""One parameter of a merge recipe, in mergekit's grammar: a value for all tensors, a gradient over the
layers, or values by filter.

    0.5
    [0.2, 0.8]                       from the first layer to the last, linear in between
    - filter: mlp                    part of the tensor's name, as in mergekit
      value: 0.7
    - filter: "*.q_proj.weight"      a glob over the whole name
      value: [0.2, 0.8]
    - filter: "re:layers\\.[0-3]\\."  a regular expression, found anywhere
      value: 0.3
    - value: 0.5                     everything else: the first filter that fits decides
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from copd_megatron.config.typecheck import unknown_key
from copd_megatron.errors import ConfigError

Scalar = bool | float

_SWITCHES = {"normalize", "rescale", "int8_mask"}
_SHARES = {
    "density": "the share of elements that is kept",
    "t": "the way from the first model to the second; beyond them, use task_arithmetic with a lambda",
}
"""Parameters between 0 and 1, and what they are. Weights and lambda may be any finite number: a negative one
takes a task away (arXiv 2212.04089), and weights may count samples."""
_MAX_PATTERN = 1000
_MAX_REPEATS = 4


def check_setting(key: str, setting: Any, where: str) -> None:
    """Refuses what is no value of a parameter.

    Args:
        key: the parameter.
        where: file and place, for messages.

    Raises:
        ConfigError: says what is wrong with it.
    """
    if isinstance(setting, Mapping):
        setting = [setting]
    if not _is_filters(setting):
        _check_values(key, setting, where)
        return
    for number, item in enumerate(setting):
        for name in item:
            if name not in ("filter", "value"):
                raise unknown_key(where, f"[{number}].{name}", ("filter", "value"))
        if item.get("value") is None:
            raise ConfigError(f"{where}[{number}]: value is missing")
        _check_filter(item.get("filter"), f"{where}[{number}].filter")
        _check_values(key, item["value"], f"{where}[{number}].value")


def evaluate(setting: Any, name: str, depth: float) -> Scalar | None:
    """A checked parameter's value for a tensor; None where no filter fits.

    Args:
        name: the tensor's.
        depth: of its layer, 0 first .. 1 last.
    """
    if isinstance(setting, Mapping):
        setting = [setting]
    if _is_filters(setting):
        for item in setting:
            if _fits(item.get("filter"), name):
                return _at_depth(item["value"], depth)
        return None
    return _at_depth(setting, depth)


def unused_filters(setting: Any, names: Collection[str]) -> list[tuple[str, str]]:
    """Filters of a checked parameter that decide the value of no tensor, each with why not. A last entry
    without a filter may have nothing left to decide.

    Args:
        names: of all tensors.
    """
    if isinstance(setting, Mapping):
        setting = [setting]
    if not _is_filters(setting):
        return []
    found, left = [], set(names)
    for number, item in enumerate(setting):
        pattern = item.get("filter")
        if pattern is None and number == len(setting) - 1:
            break
        fits = {name for name in names if _fits(pattern, name)}
        shown = "an entry without a pattern" if pattern is None else repr(pattern)
        if not fits:
            found.append((shown, "fits the name of no tensor"))
        elif not fits & left:
            found.append((shown, "stands behind entries that fit all of its tensors"))
        left -= fits
    return found


def is_scalar(value: Any) -> bool:
    """Whether it is one value for all tensors."""
    return isinstance(value, bool | int | float | str)


def _is_filters(setting: Any) -> bool:
    return isinstance(setting, list) and bool(setting) and all(isinstance(item, Mapping) for item in setting)


def _check_values(key: str, setting: Any, where: str) -> None:
    """A value, or a gradient."""
    values = setting if isinstance(setting, list) else [setting]
    if not values or not all(is_scalar(value) for value in values):
        raise ConfigError(f"{where}: {setting!r} is no number, list of numbers, or list of filter and value")
    for value in values:
        _check_value(key, value, where)


def _check_value(key: str, value: Any, where: str) -> None:
    if key in _SWITCHES:
        if not isinstance(value, bool):
            raise ConfigError(f"{where}: {value!r} is not true or false")
        return
    try:
        number = float(value)
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"{where}: {value!r} is not a number") from error
    if isinstance(value, bool) or not math.isfinite(number):
        raise ConfigError(f"{where}: {value!r} is not a finite number")
    if key in _SHARES and not 0 <= number <= 1:
        raise ConfigError(f"{where}: a {key} of {value} is not in 0 .. 1, {_SHARES[key]}")


def _check_filter(pattern: Any, where: str) -> None:
    if pattern is not None and not isinstance(pattern, str):
        raise ConfigError(f"{where}: {pattern!r} is not a string")
    if isinstance(pattern, str) and pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except (re.error, RecursionError, OverflowError) as error:
            raise ConfigError(f"{where}: not a regular expression: {error}") from error
        if len(pattern) > _MAX_PATTERN or _may_search_for_ever(pattern[3:]):
            raise ConfigError(
                f"{where}: this regular expression may search for ever: repeat no groups, and use * and + at "
                f"most {_MAX_REPEATS} times"
            )


def _may_search_for_ever(pattern: str) -> bool:
    """Whether a pattern repeats a group, or repeats so often that names of some hundred letters take long.
    A merge recipe may be a stranger's."""
    plain = re.sub(r"\[\^?\]?(?:\\.|[^\]\\])*\]", "x", re.sub(r"\\[^\]]", "x", pattern))
    repeats = re.findall(r"[*+]|\{\d*,\d*\}", plain)
    return len(repeats) > _MAX_REPEATS or re.search(r"\)(?:[*+]|\{\d+\}|\{\d*,\d*\})", plain) is not None


def _fits(pattern: str | None, name: str) -> bool:
    if pattern is None:
        return True
    if pattern.startswith("re:"):
        return re.search(pattern[3:], name) is not None
    if any(character in pattern for character in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    return pattern in name


def _at_depth(values: Any, depth: float) -> Scalar:
    """A value, or a gradient's at a depth: numbers are linear between points, switches hold until the
    next."""
    if not isinstance(values, list):
        return values if isinstance(values, bool) else float(values)
    place = depth * (len(values) - 1)
    below = min(int(place), len(values) - 1)
    if isinstance(values[below], bool):
        return bool(values[below])
    above = min(below + 1, len(values) - 1)
    return (1 - (place - below)) * float(values[below]) + (place - below) * float(values[above])
