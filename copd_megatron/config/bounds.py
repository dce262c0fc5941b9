"""Which values a setting may have, written beside the field that has them, and one check that reads them.

A field carries its limits in its type, where mypy and OmegaConf see the plain type only:

    lr: PositiveFloat = 1e-6
    dual_clip: Annotated[float, Bounds(above=1)] | None = None

``violations`` walks over all settings. What no field may be is refused for all of them: a number that is not
finite, a whole number that does not fit into 64 bits, a path whose ``~`` names nobody's home.
"""

from __future__ import annotations

import functools
import math
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Annotated, Any, Protocol

_LARGEST_INT = 2**63 - 1


class Limit(Protocol):
    """What a field's type carries in ``Annotated``."""

    def problem(self, value: Any) -> str | None:
        """What is wrong with ``value``, to be read after it; None: nothing."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """A range of numbers."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    also: float | None = None
    """A value outside the range that is allowed nevertheless."""

    def problem(self, value: float) -> str | None:
        inside = (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )
        return None if inside or value == self.also else f"must be {self}"

    def __str__(self) -> str:
        if self.at_least is not None and self.at_most is not None:
            between = f"between {self.at_least:.12g} and {self.at_most:.12g}"
            return between if self.also is None else f"{between}, or {self.also:g}"
        ends = {"at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
        text = " and ".join(f"{word} {end:.12g}" for word, end in ends.items() if end is not None)
        return text if self.also is None else f"{text}, or {self.also:g}"


@dataclass(frozen=True)
class OneOf:
    """A list of words."""

    words: tuple[str, ...]
    ignore_case: bool = False

    def problem(self, value: str) -> str | None:
        wanted = value.upper() if self.ignore_case else value
        return None if wanted in self.words else f"must be {self}"

    def __str__(self) -> str:
        return f"one of {', '.join(self.words)}"


@dataclass(frozen=True)
class Matches:
    """Text that a pattern describes."""

    pattern: str
    words: str
    """The pattern in words, to be read after "must be"."""

    def problem(self, value: str) -> str | None:
        return None if re.fullmatch(self.pattern, value, re.DOTALL) else f"must be {self.words}"

    def __str__(self) -> str:
        return self.words


@dataclass(frozen=True)
class FilePath:
    """A path on this machine. ``~`` stands for the user's home and is expanded when the settings are read."""

    def problem(self, value: str) -> str | None:
        if "\0" in value:
            return "must not hold a null character"
        if value.startswith("~"):
            return f"begins with {value.split('/')[0]}, and there is no such user; write the folder out"
        return None if value else "must not be empty"

    def __str__(self) -> str:
        return "a path"


PositiveInt = Annotated[int, Bounds(at_least=1)]
NonNegativeInt = Annotated[int, Bounds(at_least=0)]
PositiveFloat = Annotated[float, Bounds(above=0)]
NonNegativeFloat = Annotated[float, Bounds(at_least=0)]
Share = Annotated[float, Bounds(above=0, at_most=1)]
"""A part of a whole, not none of it."""
PathText = Annotated[str, FilePath()]
Seconds = Annotated[float, Bounds(above=0, at_most=1e8)]
"""A time to wait. Longer ones, three years and more, are beyond what timers can count."""
FilledText = Annotated[str, Matches(r".+", "a text that is not empty")]


def violations(section: Any, path: str = "") -> Iterator[str]:
    """What is wrong with the values of ``section`` (a dataclass of settings) and of all beneath it.

    Args:
        path: dotted key of ``section``.

    Yields:
        ``key: value must be ... (default ...)``
    """
    kind: Any = type(section)
    hints = annotated_hints(kind)
    for field in fields(section):
        key = f"{path}.{field.name}" if path else field.name
        for problem in _of_value(getattr(section, field.name), hints[field.name], key):
            yield problem + _default(field)


@functools.cache
def annotated_hints(section: type) -> dict[str, Any]:
    """Types of a dataclass's fields, with their limits."""
    return typing.get_type_hints(section, include_extras=True)


def limits_of(hint: Any) -> tuple[Limit, ...]:
    """The limits that a field's type carries; of the type itself, not of a list's items."""
    if typing.get_origin(hint) is Annotated:
        return tuple(typing.get_args(hint)[1:])
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(limit for part in typing.get_args(hint) for limit in limits_of(part))
    return ()


def divisors(number: int) -> list[int]:
    """All whole numbers that divide ``number``, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def _of_value(value: Any, hint: Any, key: str) -> Iterator[str]:
    if value is None:
        return
    if is_dataclass(value):
        yield from violations(value, key)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _of_value(item, typing.get_args(hint)[1], f"{key}.{name}")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _of_value(item, typing.get_args(hint)[0], f"{key}[{i}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{key}: {value} must be a finite number"
    elif isinstance(value, int) and abs(value) > _LARGEST_INT:
        yield f"{key}: a number of {len(str(abs(value)))} digits must be at most {_LARGEST_INT}"
    else:
        shown = repr(value) if isinstance(value, str) else value
        problems = (limit.problem(value) for limit in limits_of(hint))
        yield from (f"{key}: {shown} {problem}" for problem in problems if problem)


def _default(field: Field[Any]) -> str:
    """The default, as the end of a message; nothing where the message of an item below has said it."""
    if field.default in (MISSING, None) or field.default == "???":
        return ""
    return f" (default {getattr(field.default, 'value', field.default)})"
