"""Bounds on single settings, as problems in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator


def at_least(minimum: float, **values: float | None) -> Iterator[str]:
    """Lower bounds; a double underscore in a keyword stands for the dot of the key."""
    for key, value in values.items():
        if value is not None and not (value >= minimum and math.isfinite(value)):
            yield f"{key.replace('__', '.')}: {value} must be at least {minimum:g}"


def above(minimum: float, **values: float | None) -> Iterator[str]:
    for key, value in values.items():
        if value is not None and not (value > minimum and math.isfinite(value)):
            yield f"{key.replace('__', '.')}: {value} must be above {minimum:g}"


def within(low: float, high: float, **values: float | None) -> Iterator[str]:
    for key, value in values.items():
        if value is not None and not low <= value <= high:
            yield f"{key.replace('__', '.')}: {value} must be between {low:g} and {high:g}"


def under(prefix: str, problems: Iterable[str]) -> Iterator[str]:
    return (f"{prefix}.{problem}" for problem in problems)


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
