"""Equality of two structures: what a gold answer accepts."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from copd_megatron.rewards.mathematics import scalars
from copd_megatron.rewards.mathematics.shapes import (
    Chain,
    Equation,
    Items,
    Matrix,
    Named,
    Region,
    Scalar,
    Shape,
    Span,
    UnreadableError,
    Words,
)
from copd_megatron.rewards.mathematics.units import NONE

_PERCENT = Fraction(1, 100)
_MAX_MATCHED = 60
_MAX_STEPS = 50_000
"""Work that one comparison may take, in comparisons of two structures or two expressions: some 0.1 ms each,
once each text has been parsed and evaluated. Two sets of 60 take 15,000; sets of sets may take any number."""
_REGION_STEPS = 100


class TooMuchWorkError(Exception):
    """No answer needs as much work as this comparison. By count, not by the clock: verdicts are the same on
    every machine."""


class Comparison:
    """Compares shapes with a rounding, the decimals that count."""

    def __init__(self, rounding: int) -> None:
        self._rounding = rounding
        self._steps_left = _MAX_STEPS

    def same(self, gold: Shape, found: Shape) -> bool:
        """Whether ``found`` answers what ``gold`` does. Raises TooMuchWorkError."""
        self._spend(1)
        gold, found = _simplified(gold), _simplified(found)
        if isinstance(gold, Named) or isinstance(found, Named):
            return self._named(gold, found)
        if isinstance(found, Items) and found.is_choice and not isinstance(gold, Items | Region):
            return all(self.same(gold, item) for item in found.items)
        match gold, found:
            case Scalar(), Scalar():
                return self._scalars(gold, found)
            case Items(), Items():
                return self._items(gold, found)
            case Matrix(), Matrix():
                return gold.is_determinant == found.is_determinant and self._rows(gold.rows, found.rows)
            case Matrix(), Items() if found.kind == "tuple":
                return self._all(_entries(gold), found.items)
            case Items(), Matrix() if gold.kind == "tuple":
                return self._all(gold.items, _entries(found))
            case Equation(), Equation():
                return self._equations(gold, found)
            case Words(), Words():
                return _letters(gold.text) == _letters(found.text)
            case (Span() | Region(), _) | (_, Span() | Region()):
                return self._regions(gold, found)
        return False

    def _spend(self, steps: int) -> None:
        self._steps_left -= steps
        if self._steps_left < 0:
            raise TooMuchWorkError(f"more than {_MAX_STEPS} steps")

    def _named(self, gold: Shape, found: Shape) -> bool:
        if isinstance(gold, Named) and isinstance(found, Named):
            if gold.name == found.name:
                return self.same(gold.value, found.value)
            if isinstance(gold.value, Scalar) and isinstance(found.value, Scalar):
                first = Equation(Scalar(gold.name), gold.value)
                second = Equation(Scalar(found.name), found.value)
                return self._equations(first, second)
            return False
        if isinstance(gold, Named):
            if isinstance(found, Equation) and isinstance(gold.value, Scalar):
                return self._equations(Equation(Scalar(gold.name), gold.value), found)
            return self.same(gold.value, found)
        assert isinstance(found, Named)
        if isinstance(gold, Equation) and isinstance(found.value, Scalar):
            return self._equations(gold, Equation(Scalar(found.name), found.value))
        return self.same(gold, found.value)

    # ---- single expressions ------------------------------------------------------------------------------

    def _scalars(self, gold: Scalar, found: Scalar) -> bool:
        if isinstance(found, Chain) and not all(self._equal(found.text, part.text) for part in found.earlier):
            return False
        if found.approximate is not None and not self._approximates(found):
            return False
        if not self._quantities(gold, found):
            if found.approximate is None:
                return False
            return self._quantities(gold, Scalar(found.approximate, found.unit, found.percent))
        return not (
            _is_written_out(gold) and scalars.is_unevaluated(found.text) and _is_arithmetic(found.text)
        )

    def _quantities(self, gold: Scalar, found: Scalar) -> bool:
        if gold.unit != NONE and found.unit != NONE and gold.unit != found.unit:
            return self._converted(gold, found)
        if (gold.unit.is_angle or found.unit.is_angle) and gold.unit != found.unit:
            return self._equal(gold.text, found.text) or self._equal(_in_radians(gold), _in_radians(found))
        if gold.percent != found.percent:
            share, plain = (gold, found) if gold.percent else (found, gold)
            return self._equal(plain.text, share.text) or self._equal_fraction(
                plain.text, share.text, _PERCENT
            )
        return self._equal(gold.text, found.text)

    def _converted(self, gold: Scalar, found: Scalar) -> bool:
        if gold.unit.dimensions != found.unit.dimensions:
            angles = gold.unit.is_angle and found.unit.is_angle
            return angles and self._equal(_in_radians(gold), _in_radians(found))
        return self._equal_fraction(gold.text, found.text, found.unit.factor / gold.unit.factor)

    def _equal_fraction(self, gold: str, found: str, factor: Fraction) -> bool:
        """Whether ``found * factor`` equals ``gold``."""
        first, second = scalars.number(gold), scalars.number(found)
        if first is None or second is None:
            self._spend(1)
            return scalars.equal_scaled(gold, found, factor, self._rounding)
        product = second.value * factor
        if first.is_decimal or second.is_decimal:
            return abs(first.value - product) <= abs(first.value) * Fraction(5, 10**self._rounding)
        return first.value == product

    def _approximates(self, found: Scalar) -> bool:
        """Whether what stands after the sign of approximation is near what stands before it."""
        try:
            return self._equal(found.text, found.approximate or "", rounding=2) or scalars.close(
                found.text, found.approximate or "", 0.02
            )
        except scalars.UnreadableScalarError:
            return False

    def _equal(self, gold: str, found: str, rounding: int | None = None) -> bool:
        self._spend(1)
        return scalars.equal(gold, found, self._rounding if rounding is None else rounding)

    # ---- several expressions -----------------------------------------------------------------------------

    def _items(self, gold: Items, found: Items) -> bool:
        if {gold.kind, found.kind} == {"set", "tuple"}:
            return False
        first, second = list(gold.items), list(found.items)
        if "set" in (gold.kind, found.kind):
            first, second = self._distinct(first), self._distinct(second)
        if len(first) != len(second):
            return False
        if "tuple" in (gold.kind, found.kind):
            return self._all(first, second)
        return self._matched(first, second)

    def _distinct(self, items: list[Shape]) -> list[Shape]:
        kept: list[Shape] = []
        for item in items[:_MAX_MATCHED]:
            if not any(self._safely(other, item) for other in kept):
                kept.append(item)
        return kept + items[_MAX_MATCHED:]

    def _matched(self, gold: list[Shape], found: list[Shape]) -> bool:
        """Whether each gold item has one of its own in ``found``."""
        if len(gold) > _MAX_MATCHED:
            return self._all(gold, found)
        left = list(found)
        for item in gold:
            partner = next((other for other in left if self._safely(item, other)), None)
            if partner is None:
                return False
            left.remove(partner)
        return True

    def _safely(self, gold: Shape, found: Shape) -> bool:
        try:
            return self.same(gold, found)
        except (UnreadableError, scalars.UnreadableScalarError):
            return False

    def _all(self, gold: Sequence[Shape], found: Sequence[Shape]) -> bool:
        return len(gold) == len(found) and all(map(self.same, gold, found))

    def _rows(self, gold: Sequence[Sequence[Scalar]], found: Sequence[Sequence[Scalar]]) -> bool:
        return len(gold) == len(found) and all(map(self._all, gold, found))

    # ---- equations and regions ---------------------------------------------------------------------------

    def _equations(self, gold: Equation, found: Equation) -> bool:
        """Whether one equation is the other times a number."""
        first, second = (scalars.difference(side.left.text, side.right.text) for side in (gold, found))
        return scalars.proportional(first, second)

    def _regions(self, gold: Shape, found: Shape) -> bool:
        """Unions of intervals, as sets of the real line; a pair in parentheses may be an open interval."""
        if isinstance(gold, Span) and isinstance(found, Span):
            opens = (gold.low_open, gold.high_open) == (found.low_open, found.high_open)
            return opens and self._scalars(gold.low, found.low) and self._scalars(gold.high, found.high)
        if isinstance(gold, Items) and gold.kind != "tuple" and not isinstance(found, Region):
            return False
        self._spend(_REGION_STEPS)
        return bool(_as_set(gold) == _as_set(found))


def _simplified(shape: Shape) -> Shape:
    """A list of one is its item; a list of assignments to one name is a list of values."""
    if isinstance(shape, Items) and shape.kind == "list":
        names = [item.name for item in shape.items if isinstance(item, Named)]
        if names and len(set(names)) == 1 and isinstance(shape.items[0], Named):
            values = tuple(item.value if isinstance(item, Named) else item for item in shape.items)
            return Named(names[0], Items(values, "list", shape.is_choice))
        if len(names) == len(shape.items) and len(set(names)) == len(names) > 1:
            ordered = sorted(
                (item for item in shape.items if isinstance(item, Named)), key=lambda item: item.name
            )
            return Items(tuple(item.value for item in ordered), "tuple")
    if isinstance(shape, Items) and len(shape.items) == 1 and isinstance(shape.items[0], Scalar):
        return shape.items[0]
    if isinstance(shape, Items) and not shape.items:
        return Scalar(r"\emptyset")
    if isinstance(shape, Region) and len(shape.pieces) == 1 and not shape.without:
        return shape.pieces[0]
    return shape


def _entries(matrix: Matrix) -> tuple[Scalar, ...]:
    """A row or column vector's entries; empty for a matrix of several rows and columns."""
    if len(matrix.rows) == 1:
        return matrix.rows[0]
    return tuple(row[0] for row in matrix.rows) if all(len(row) == 1 for row in matrix.rows) else ()


def _is_written_out(gold: Scalar) -> bool:
    return scalars.number(gold.text) is not None


def _is_arithmetic(text: str) -> bool:
    """Sums, differences and products of plain numbers, which a question may have asked to work out."""
    return re.fullmatch(r"[\d\s.+\-(){}/*]*(?:\\cdot[\d\s.+\-(){}/*]*)*", text) is not None


def _in_radians(scalar: Scalar) -> str:
    if scalar.unit.dimensions == (("degree", 1),):
        return rf"({scalar.text}) \cdot \frac{{\pi}}{{180}}"
    return scalar.text


def _letters(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", " ", text.casefold()).strip()


def _as_set(shape: Shape) -> Any:
    """A shape as a sympy set of real numbers."""
    sympy = _sympy()
    match shape:
        case Span():
            low, high = scalars.expression(shape.low.text), scalars.expression(shape.high.text)
            return sympy.Interval(low, high, shape.low_open, shape.high_open)
        case Region():
            whole = sympy.Union(*(_as_set(piece) for piece in shape.pieces))
            removed = sympy.FiniteSet(*(scalars.expression(part.text) for part in shape.without))
            return whole - removed
        case Items(kind="tuple", items=(Scalar() as low, Scalar() as high)):
            return _as_set(Span(low, high, True, True))
        case Items(items=items) if all(isinstance(item, Scalar) for item in items):
            values = [scalars.expression(item.text) for item in items if isinstance(item, Scalar)]
            return sympy.FiniteSet(*values)
        case Scalar(text=text) if text.replace(" ", "") == r"\mathbb{R}":
            return sympy.Interval(-sympy.oo, sympy.oo)
        case Scalar(text=text):
            return sympy.FiniteSet(scalars.expression(text))
        case Named(value=value):
            return _as_set(value)
    raise UnreadableError("no set of numbers")


@functools.cache
def _sympy() -> Any:
    return importlib.import_module("sympy")
