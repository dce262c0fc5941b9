r"""Equality of single expressions: exact where both are exact, within a tolerance where one is a decimal.

math-verify's LaTeX parser gives sympy objects, unevaluated; their size is bounded before anything is
computed. Numbers are compared to 22 digits. Formulas are compared at fixed points of the real line, to as
many, which finds a difference in milliseconds where symbolic simplification takes seconds, or for ever.
"""

from __future__ import annotations

import functools
import importlib
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from copd_megatron.rewards.parsing.magnitude import is_evaluable, is_tall

_DIGITS = 30
_EXACT = 10.0**-22
"""Largest difference, as a share of the larger, of two exact numbers that count as equal."""
_INTEGER = re.compile(r"([-+]?)\s?(\d{1,300})")
_DECIMAL = re.compile(r"([-+]?)\s?(\d{0,300})\.(\d{1,300})")
_FRACTION = re.compile(
    r"([-+]?)\s?(?:\\frac\{\s?(-?\d{1,300})\s?\}\{\s?(\d{1,300})\s?\}|(\d{1,300})\s?/\s?(\d{1,300}))"
)
_MIXED = re.compile(
    r"([-+]?)\s?(\d{1,20})(?:\s+(\d{1,20})\s?/\s?(\d{1,20})|\s?\\frac\{\s?(\d{1,20})\s?\}\{\s?(\d{1,20})\s?\})"
)
_REPEATING = re.compile(r"([-+]?)(\d{0,50})\.(\d{0,50})(?:\\overline\{(\d{1,50})\}|\((\d{1,50})\))")
_SCIENTIFIC = re.compile(
    r"([-+]?)\s?(\d{0,60}\.?\d{0,60})\s?\\cdot\s?10\s?\^\s?(?:\{\s?([-+]?\d{1,4})\s?\}|(\d))"
)
_BASED = re.compile(r"([0-9A-F]{1,200})_\s?\{?\s?(\d{1,2})\s?\}?")
_SUMS = re.compile(r"\\(?:sum|prod|int)(?![A-Za-z])")
_IMAGINARY = re.compile(r"(?<![A-Za-z\\])i(?![A-Za-z])")
_REFUSED = re.compile(r"\d\s+\d|\\ldots|\\approx|\d_|[?!]{2,}|\\overline|\\to(?![A-Za-z])|[:&]|\.\.")
_OPERATION = re.compile(r"(?<=[\d)}])\s?(?:\+|-|\\cdot|(?<!\d)/|\*)\s?(?=[\d({\\])|!|\\binom|\^")
_ONE = Fraction(1)
_NUM_POINTS = 6
_MAX_KEPT = 512
"""Texts whose formulas and values are kept: every pair of two lists is compared, and each text is parsed and
evaluated once."""
_POINTS = (
    ("1.6180339887", "-0.7390851332", "2.2360679775", "0.5671432904", "-1.3247179572", "3.1462643699"),
    ("0.9159655942", "1.2020569032", "-2.5029078751", "-0.3036630029", "4.6692016091", "0.2614972128"),
    ("2.6854520011", "-1.7052111401", "0.6434105463", "1.4513692349", "-0.8346268417", "5.2695712342"),
)


@dataclass(frozen=True)
class Number:
    """A number that is written out."""

    value: Fraction
    is_decimal: bool = False
    base: int | None = None


@functools.lru_cache(maxsize=_MAX_KEPT)
def number(text: str) -> Number | None:
    """The number that a text writes out; None for other expressions. Raises ZeroDivisionError."""
    text = text.strip()
    if found := _INTEGER.fullmatch(text):
        return Number(Fraction(int(found.group(1) + found.group(2))))
    if found := _DECIMAL.fullmatch(text):
        sign, whole, digits = found.groups()
        value = Fraction(int((whole or "0") + digits), 10 ** len(digits))
        return Number(-value if sign == "-" else value, is_decimal=True)
    if found := _FRACTION.fullmatch(text):
        sign, top, bottom, left, right = found.groups()
        value = Fraction(int(top or left), int(bottom or right))
        return Number(-value if sign == "-" else value)
    return _mixed(text) or _repeating(text) or _scientific(text) or _based(text)


def _mixed(text: str) -> Number | None:
    found = _MIXED.fullmatch(text)
    if found is None:
        return None
    sign, whole, *parts = found.groups()
    top, bottom = (int(part) for part in parts if part is not None)
    if top >= bottom:
        return None  # 3\frac{4}{3} is a product as likely as a mixed number
    value = int(whole) + Fraction(top, bottom)
    return Number(-value if sign == "-" else value)


def _repeating(text: str) -> Number | None:
    found = _REPEATING.fullmatch(text)
    if found is None:
        return None
    sign, whole, once, first, second = found.groups()
    period = first or second
    value = Fraction(int((whole or "0") + once + period) - int((whole or "0") + once or "0"))
    value /= 10 ** (len(once) + len(period)) - 10 ** len(once)
    return Number(-value if sign == "-" else value)


def _scientific(text: str) -> Number | None:
    found = _SCIENTIFIC.fullmatch(text)
    if found is None or not re.search(r"\d", found.group(2)):
        return None
    sign, digits, braced, plain = found.groups()
    exponent = int(braced or plain)
    if abs(exponent) > 400:
        return None
    value = Fraction(digits) * Fraction(10) ** exponent
    return Number(-value if sign == "-" else value, is_decimal="." in digits)


def _based(text: str) -> Number | None:
    found = _BASED.fullmatch(text)
    if found is None:
        return None
    base = int(found.group(2))
    try:
        return Number(Fraction(int(found.group(1), base)), base=base) if 2 <= base <= 36 else None
    except ValueError:
        return None


def equal(gold: str, found: str, rounding: int) -> bool:
    """Whether two expressions in canonical notation are equal.

    ``rounding``: decimals, and significant digits, to which an answer with a decimal point must agree.

    Raises UnreadableScalarError if one of them is no expression.
    """
    if bare(gold) == bare(found):
        return True
    first, second = number(gold), number(found)
    if first is not None and second is not None:
        return _equal_numbers(first, second, gold, found, rounding)
    return equal_scaled(gold, found, _ONE, rounding)


def equal_scaled(gold: str, found: str, factor: Fraction, rounding: int) -> bool:
    """Whether ``found`` times a factor equals ``gold``, as formulas. Raises as ``equal``."""
    if is_tall(gold) or is_tall(found):
        return False
    left, right = _sampled(gold, _ONE), _sampled(found, factor)
    if not (left.is_evaluable and right.is_evaluable):
        return False
    tolerance = 5 * 10.0**-rounding if _has_decimals(gold) or _has_decimals(found) else None
    return _equal_expressions(left, right, tolerance, rounding)


@functools.lru_cache(maxsize=_MAX_KEPT)
def bare(text: str) -> str:
    """The text without spaces that separate nothing and braces around a single sign."""
    text = re.sub(r"(?<=[\^_])\{(\w)\}", r"\1 ", text)
    return re.sub(r"(?<![A-Za-z0-9])\s+|\s+(?![A-Za-z0-9])", "", text).strip()


def is_unevaluated(text: str) -> bool:
    """Whether an expression leaves arithmetic to the reader: ``6 \\cdot 7``, ``5!``."""
    return number(text) is None and _OPERATION.search(text) is not None


def _has_decimals(text: str) -> bool:
    return re.search(r"\d\.\d|(?<!\d)\.\d", text) is not None


def _equal_numbers(first: Number, second: Number, gold: str, found: str, rounding: int) -> bool:
    if (first.base is None and second.base in (None, 10)) or first.base == second.base or first.base == 10:
        exact = first.value == second.value
    elif first.base is not None and second.base is None:
        exact = gold.split("_")[0].strip() == found.strip()  # "1011" where the base was asked for
    else:
        return False
    if exact or not (first.is_decimal or second.is_decimal):
        return exact
    return _near(first.value, second.value, rounding)


def _near(first: Fraction, second: Fraction, rounding: int) -> bool:
    difference, size = abs(first - second), max(abs(first), abs(second))
    return difference <= Fraction(1, 2 * 10**rounding) * min(Fraction(10) * size, Fraction(2))


class UnreadableScalarError(ValueError):
    """A text that is not, as a whole, one expression."""


@functools.lru_cache(maxsize=_MAX_KEPT)
def expression(text: str) -> Any:
    """The sympy expression that a text writes, not evaluated. Raises UnreadableScalarError."""
    if _REFUSED.search(text):
        raise UnreadableScalarError(f"{text[:60]!r} is not one expression")
    library = _library()
    try:
        parsed = library.parser(
            text,
            is_real=True,
            convert_degrees=False,
            normalization_config=None,
            conversion_config=library.conversion,
        )
    except Exception as error:  # the parser raises bare exceptions of many types
        raise UnreadableScalarError(f"{text[:60]!r}: {str(error)[:80]}") from error
    sympy = library.sympy
    if not isinstance(parsed, sympy.Expr):
        raise UnreadableScalarError(f"{text[:60]!r} is a {type(parsed).__name__}")
    if not is_evaluable(parsed):
        return parsed
    if _IMAGINARY.search(text) and not _SUMS.search(text):
        parsed = parsed.subs(sympy.Symbol("i", real=True), sympy.I)
    return parsed


class Sampled:
    """A formula with its value, or its values at fixed points; each is worked out when first asked for."""

    def __init__(self, formula: Any) -> None:
        self.formula = formula
        self.symbols = formula.free_symbols
        self._at: dict[int, Any] = {}

    @functools.cached_property
    def is_evaluable(self) -> bool:
        """Whether it is small enough to be evaluated."""
        return is_evaluable(self.formula)

    @functools.cached_property
    def value(self) -> Any:
        """Of a formula without symbols, as ``_value`` has it."""
        return _value(self.formula)

    def at(self, row: int) -> Any:
        """Its value at a point."""
        if row not in self._at:
            ordered = enumerate(sorted(self.symbols, key=str))
            point = {symbol: _coordinate(index, row) for index, symbol in ordered}
            self._at[row] = _value(self.formula.subs(point))
        return self._at[row]


@functools.lru_cache(maxsize=_MAX_KEPT)
def _sampled(text: str, factor: Fraction) -> Sampled:
    formula = expression(text)
    return Sampled(formula if factor == 1 else formula * _library().sympy.Rational(factor))


@functools.lru_cache(maxsize=_MAX_KEPT)
def difference(left: str, right: str) -> Sampled:
    """What one expression exceeds another by. Raises UnreadableScalarError."""
    return Sampled(expression(left) - expression(right))


def forget() -> None:
    """Drops the texts that are kept."""
    for kept in (number, bare, expression, _sampled, difference):
        kept.cache_clear()


def _equal_expressions(left: Sampled, right: Sampled, tolerance: float | None, rounding: int) -> bool:
    if not left.symbols | right.symbols:
        return _equal_values(left, right, tolerance, rounding)
    if left.symbols != right.symbols or len(left.symbols) > 8:
        return False
    agreed = 0
    for row in range(_NUM_POINTS):
        first, second = left.at(row), right.at(row)
        if first is None or second is None:
            if (first is None) != (second is None):
                return False
            continue
        if abs(first - second) > (tolerance or _EXACT) * max(abs(first), abs(second)):
            return False
        agreed += 1
    return agreed >= 2


def _coordinate(index: int, row: int) -> Any:
    digits = _POINTS[index % len(_POINTS)][row]
    return _library().sympy.Rational(digits) + index // len(_POINTS)


def _equal_values(left: Sampled, right: Sampled, tolerance: float | None, rounding: int) -> bool:
    first, second = left.value, right.value
    if first is None or second is None:
        return bool(left.formula == right.formula)
    difference, size = abs(first - second), max(abs(first), abs(second))
    if tolerance is None:
        return bool(difference <= _EXACT * size)
    return bool(difference <= tolerance * size and difference <= 10.0**-rounding)


def _value(expression: Any) -> Any:
    """An expression's value to 30 digits; 0 where cancellation leaves no digit of it; None for no number."""
    value = expression.evalf(_DIGITS)
    if getattr(value, "_prec", _DIGITS) == 1:
        return 0
    return value if value.is_number and value.is_finite and value.is_comparable is not None else None


@dataclass(frozen=True)
class _Library:
    parser: Any
    conversion: Any
    sympy: Any


@functools.cache
def _library() -> _Library:
    module = importlib.import_module("latex2sympy2_extended.latex2sympy2")
    return _Library(
        module.latex2sympy, module.ConversionConfig(lowercase_symbols=False), importlib.import_module("sympy")
    )


def close(first: str, second: str, share: float) -> bool:
    """Whether two numbers differ by less than a share of the larger. Raises UnreadableScalarError."""
    if is_tall(first) or is_tall(second):
        return False
    left, right = _sampled(first, _ONE), _sampled(second, _ONE)
    if not (left.is_evaluable and right.is_evaluable):
        return False
    one, other = left.value, right.value
    if one is None or other is None:
        return False
    return bool(abs(one - other) <= share * max(abs(one), abs(other)))


def proportional(first: Sampled, second: Sampled) -> bool:
    """Whether one of two formulas is the other times a number that is not 0."""
    if first.symbols != second.symbols or not 0 < len(first.symbols) <= 8:
        return False
    if not (first.is_evaluable and second.is_evaluable):
        return False
    ratio, agreed = None, 0
    for row in range(_NUM_POINTS):
        one, other = first.at(row), second.at(row)
        if one is None or other is None or not one or not other:
            continue
        if ratio is None:
            ratio = one / other
        elif abs(one / other - ratio) > _EXACT * abs(ratio):
            return False
        agreed += 1
    return agreed >= 2
