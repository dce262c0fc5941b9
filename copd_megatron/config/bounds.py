"""Bounds on single settings: declared beside the setting, checked in one place.

    lr: float = number(1e-6, above=0)

A setting that may be null has no bound on null. Every number must be finite, bounds or not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

_METADATA_KEY = "bounds"


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a number must satisfy. None: no such bound."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None

    def describe(self) -> str:
        """``at least 1``, ``between 0 and 1``, ``above 0 and at most 1``."""
        if self.at_least is not None and self.at_most is not None:
            return f"between {self.at_least:g} and {self.at_most:g}"
        parts = [
            f"{word} {bound:g}"
            for word, bound in (("at least", self.at_least), ("above", self.above), ("at most", self.at_most))
            if bound is not None
        ]
        return " and ".join(parts)

    def hold(self, value: float) -> bool:
        """Whether the number satisfies them."""
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
        )


def number(
    default: float | None,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
) -> Any:
    """A dataclass field with this default and these bounds."""
    bounds = Bounds(at_least=at_least, above=above, at_most=at_most)
    return field(default=default, metadata={_METADATA_KEY: bounds})


def out_of_bounds(section: Any, key: str = "") -> Iterator[str]:
    """Problems of a section's numbers and of the sections in it, in the order of the settings.

    Args:
        section: a dataclass instance.
        key: its dotted key; empty for the whole configuration.
    """
    for setting in fields(section):
        value = getattr(section, setting.name)
        name = f"{key}.{setting.name}" if key else setting.name
        if is_dataclass(value):
            yield from out_of_bounds(value, name)
        elif isinstance(value, Mapping):
            for inner, part in value.items():
                yield from out_of_bounds(part, f"{name}.{inner}")
        elif isinstance(value, list):
            for i, part in enumerate(value):
                if is_dataclass(part):
                    yield from out_of_bounds(part, f"{name}[{i}]")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield from _problem(name, value, setting.metadata.get(_METADATA_KEY, Bounds()))


def _problem(name: str, value: float, bounds: Bounds) -> Iterator[str]:
    if not math.isfinite(value):
        yield f"{name}: {value} must be a finite number{', ' if bounds.describe() else ''}{bounds.describe()}"
    elif not bounds.hold(value):
        yield f"{name}: {value} must be {bounds.describe()}"


def divisors(number: int) -> list[int]:
    """Whole numbers that divide ``number``, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]
