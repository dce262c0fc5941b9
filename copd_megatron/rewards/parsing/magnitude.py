"""How large the numbers in a formula would get, told before anything is evaluated."""

from __future__ import annotations

import math
import re
from typing import Any

MAX_BITS = 200_000
"""Largest number that is evaluated: 60,000 digits. ``9^{9^9}`` has 1.2 thousand million bits."""
MAX_EXPONENT = 10_000
"""Largest power of a sum that is expanded."""
MAX_TERMS = 20_000
"""Most terms that the power of a sum may expand to."""
_MAX_NODES = 5_000

_OPEN = r"\s{0,3}(?:\^|\*\*)[\s{(]{0,6}"
_TOWER = re.compile(r"(?<!\d)(\d{1,400})" + _OPEN + r"(\d{1,400})" + _OPEN + r"(\d{1,400})")
_POWER = re.compile(r"(?<!\d)\d{1,400}" + _OPEN + r"\d{7}")
_EXPONENT = re.compile(r"\d[eE][+-]?\d{4}")
_FACTORIAL = re.compile(r"\d{6}[\s)}]{0,3}!")
_BINOMIAL = re.compile(r"\\binom\s*(?:\{(?:[^{}]|\{[^{}]*\})*\}|[^{}\s])\s*\{[^{}]*(?:\d{5}|[\^!*\\])")
"""Choosing more than some thousand. Some parsers work that out while they read."""


def is_tall(text: str) -> bool:
    """Whether a text writes a number that is too large to evaluate: a power, a factorial, ``1e99999``.

    Some parsers compare what they have read (the ends of an interval) before anybody can look at it. What
    this does not see, ``is_evaluable`` does.
    """
    if _POWER.search(text) or _EXPONENT.search(text) or _FACTORIAL.search(text) or _BINOMIAL.search(text):
        return True
    towers = (map(int, found) for found in _TOWER.findall(text))
    return any(_log2(base) * middle ** min(top, 64) > MAX_BITS for base, middle, top in towers if middle > 1)


def _log2(number: int) -> float:
    return math.log2(max(number, 2))


def is_evaluable(expression: Any) -> bool:
    """Whether no number in a sympy expression, made without evaluation, exceeds the bounds.

    Also False for expressions of thousands of terms, and for powers of a sum that would be expanded into
    thousands of terms.
    """
    budget = [_MAX_NODES]
    try:
        return _bits(expression, budget) <= MAX_BITS and num_terms(expression) <= MAX_TERMS
    except (OverflowError, RecursionError, _TooLargeError):
        return False


def num_terms(node: Any) -> float:
    """An upper bound of the terms that a sympy expression expands to; infinite where it, or a part of it, has
    more than MAX_TERMS."""
    parts = [num_terms(part) for part in _parts(node)]
    kind = type(node).__name__
    if kind == "Add":
        count = math.fsum(parts)
    elif kind == "Mul":
        count = math.prod(parts)
    elif kind == "Pow" and node.args[1].is_Integer and parts[0] > 1:
        count = _terms_of_power(parts[0], abs(int(node.args[1])))
    else:
        count = math.inf if math.inf in parts else 1.0
    return count if count <= MAX_TERMS else math.inf


def _terms_of_power(terms: float, times: int) -> float:
    """The ways to choose ``times`` of so many terms, with repetition."""
    if terms > MAX_TERMS or times > MAX_TERMS:
        return math.inf
    return float(min(math.comb(times + int(terms) - 1, min(times, int(terms) - 1)), 10**300))


class _TooLargeError(Exception):
    """A part of the expression exceeds a bound."""


def _bits(node: Any, budget: list[int]) -> float:
    """An upper bound of the binary logarithm of what a node comes to, taken without its sign; 0 for symbols.

    Raises _TooLargeError where a part of it exceeds a bound.
    """
    budget[0] -= 1
    if budget[0] < 0:
        raise _TooLargeError
    kind = type(node).__name__
    parts = [_bits(part, budget) for part in _parts(node)]
    if getattr(node, "is_Rational", False):
        bits = math.log2(max(abs(int(node.p)), int(node.q)))
    elif getattr(node, "is_Float", False):
        bits = abs(float(node._mpf_[2] + node._mpf_[3]))
    elif kind in ("Pow", "exp"):
        bits = _bits_of_power(node, parts)
    elif kind in ("factorial", "factorial2", "subfactorial", "gamma", "RisingFactorial", "FallingFactorial"):
        value = _value_of(max(parts))
        bits = value * max(1.0, math.log2(max(value, 2.0)))
    elif kind == "Product":
        bits = max(parts, default=2.0) * _num_factors(node)
    elif kind == "binomial":
        bits = _value_of(max(parts))
    else:
        bits = sum(parts) if kind == "Mul" else max(parts, default=2.0) + math.log2(max(len(parts), 1))
    if bits > MAX_BITS:
        raise _TooLargeError
    return bits


def _num_factors(node: Any) -> float:
    """Factors of a product over ranges; ranges without two numbers as ends count as one."""
    count = 1.0
    for _, low, high in node.limits:
        if getattr(low, "is_Integer", False) and getattr(high, "is_Integer", False):
            count *= max(float(min(int(high) - int(low) + 1, 2**64)), 1.0)
    return count


def _bits_of_power(node: Any, parts: list[float]) -> float:
    base, exponent = (2.0, parts[0]) if type(node).__name__ == "exp" else (parts[0], parts[1])
    times = _value_of(exponent)
    if node.args[0].free_symbols and times > MAX_EXPONENT:
        raise _TooLargeError
    if type(node.args[0]).__name__ == "Add" and times > 1 and _num_terms(node.args[0], times) > MAX_TERMS:
        raise _TooLargeError
    return max(base, 1.0) * times


def _num_terms(base: Any, times: float) -> float:
    """Terms of the expanded power of a sum that holds symbols: (x + y + z)^9999 has fifty million."""
    if not base.free_symbols or times > MAX_EXPONENT:
        return 1.0
    return math.comb(math.ceil(times) + len(base.args) - 1, len(base.args) - 1)


def _value_of(bits: float) -> float:
    """The number that has this binary logarithm."""
    return 2.0 ** min(bits, 64.0)


def _parts(node: Any) -> tuple[Any, ...]:
    if hasattr(node, "flat"):  # a matrix
        return tuple(node.flat())
    return tuple(getattr(node, "args", ()))
