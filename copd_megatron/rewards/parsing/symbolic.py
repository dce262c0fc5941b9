"""Formulas as sympy objects, built node by node.

``sympy.parse_expr`` and ``sympify`` hand their text to ``eval``. Here each node of the syntax tree becomes
the sympy object that it stands for, so that ``x**2*sin(x)`` gives the same object as ``parse_expr`` and
``__import__("os")`` gives an error.
"""

from __future__ import annotations

import ast
import functools
import importlib
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

from copd_megatron.rewards.parsing.magnitude import MAX_TERMS, num_terms
from copd_megatron.rewards.parsing.syntax import NotUnderstoodError, reading, syntax_tree

MAX_BITS = 10_000
"""Largest integer in a formula; ``9**9**9`` has 1.2 thousand million bits."""
MAX_EXPONENT = 1_000
"""Largest exponent that is a number. Simplification may expand ``(x + 1)**n`` into n terms."""

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,19}")
_DECIMAL = re.compile(r"[0-9.]{1,400}(?:[eE][+-]?[0-9]{1,3})?")
_CONSTANTS = {"E": "E", "I": "I", "pi": "pi"}
_FUNCTIONS = {
    name: name
    for name in (
        *("exp", "log", "sqrt", "Abs", "sign"),
        *("sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "asec", "acsc", "acot"),
        *("sinh", "cosh", "tanh", "sech", "csch", "coth", "asinh", "acosh", "atanh"),
    )
} | {"ln": "log", "abs": "Abs"}


def formula(text: str) -> Any:
    """The sympy expression that ``text`` writes, with Python's operators: ``2*x**3 - sin(x)/2``.

    Any name that is neither a function nor E, I or pi is a symbol.

    Raises NotUnderstoodError: anything but numbers, names, ``+ - * / **`` and the functions listed here, a
    number beyond MAX_BITS or MAX_EXPONENT, or what expands to more than MAX_TERMS terms.
    """
    with reading():
        found = _Builder(text.strip()).build(syntax_tree(text))
        if num_terms(found) > MAX_TERMS:
            raise NotUnderstoodError(f"a formula that expands to more than {MAX_TERMS} terms")
        return found


def _power(base: Any, exponent: Any) -> Any:
    """base ** exponent, where that stays small."""
    if exponent.is_number:
        size = abs(exponent)
        if size.is_comparable and size > MAX_EXPONENT:
            raise NotUnderstoodError(f"an exponent larger than {MAX_EXPONENT}")
        if base.is_Rational and exponent.is_Rational and _num_bits(base) * size > MAX_BITS:
            raise NotUnderstoodError(f"a power of more than {MAX_BITS} bits")
    value = base**exponent
    if value.is_Pow and value.exp.is_Rational and abs(value.exp) > MAX_EXPONENT:  # (x**999)**999
        raise NotUnderstoodError(f"an exponent larger than {MAX_EXPONENT}")
    return value


def _num_bits(number: Any) -> int:
    return max(int(number.p).bit_length(), int(number.q).bit_length())


_OPERATIONS: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: _power,
}


class _Builder:
    """Turns the nodes of one text into sympy objects."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._sympy = sympy()

    def build(self, node: ast.expr) -> Any:
        value = self._built(node)
        if value.is_Rational and _num_bits(value) > MAX_BITS:
            raise NotUnderstoodError(f"a number of more than {MAX_BITS} bits")
        return value

    def _decimal(self, written: str) -> Any:
        """A decimal fraction, as precise as it has digits."""
        if not _DECIMAL.fullmatch(written):
            raise NotUnderstoodError(f"{written[:40]!r} is too large or too small a number")
        return self._sympy.Float(written)

    def _built(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=bool()):
                pass
            case ast.Constant(value=int() as number):
                return self._sympy.Integer(number)
            case ast.Constant(value=float()):
                return self._decimal(ast.get_source_segment(self._text, node) or "")
            case ast.Name(id=name) if _NAME.fullmatch(name) and name not in _FUNCTIONS:
                constant = _CONSTANTS.get(name)
                return self._sympy.Symbol(name) if constant is None else getattr(self._sympy, constant)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self.build(operand)
            case ast.UnaryOp(op=ast.UAdd(), operand=operand):
                return self.build(operand)
            case ast.BinOp(left=left, op=operation, right=right) if type(operation) in _OPERATIONS:
                return _OPERATIONS[type(operation)](self.build(left), self.build(right))
            case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if name in _FUNCTIONS:
                return getattr(self._sympy, _FUNCTIONS[name])(self.build(argument))
        raise NotUnderstoodError(f"{ast.unparse(node)[:40]!r} is not a formula")


@functools.cache
def sympy() -> Any:
    """The sympy module; takes a second the first time."""
    return importlib.import_module("sympy")
