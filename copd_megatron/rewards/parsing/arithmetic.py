"""Arithmetic on written numbers, exact and bounded."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from copd_megatron.rewards.parsing.syntax import NotUnderstoodError, reading, syntax_tree

MAX_BITS = 10_000
"""Largest numerator or denominator of an intermediate result."""

_DECIMAL = re.compile(r"[0-9+\-*/()\s]*")
_INTEGERS = re.compile(r"[0-9a-fA-FxX+\-*<>&|^~()\s]*")


@dataclass(frozen=True)
class Calculation:
    """What an expression comes to, and the numbers that stand in it."""

    value: Fraction
    numbers: tuple[int, ...]
    """In the order in which they are written."""


def calculate(text: str) -> Calculation:
    """Value of an expression over non-negative integers with ``+ - * /`` and parentheses, as a fraction.

    Raises NotUnderstoodError: another character or operator, division by zero, or a number beyond MAX_BITS.
    """
    if not _DECIMAL.fullmatch(text):
        raise NotUnderstoodError("only digits, + - * / and parentheses are read")
    with reading():
        tree = syntax_tree(text)
        numbers = [node for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        numbers.sort(key=lambda node: (node.lineno, node.col_offset))
        return Calculation(_exact(tree), tuple(_integer(node) for node in numbers))


def calculate_integer(text: str) -> int:
    """Value of an expression over integers (decimal or ``0x``) with ``+ - * << >> & | ^ ~``.

    Raises NotUnderstoodError: another character or operator, or a number beyond MAX_BITS.
    """
    if not _INTEGERS.fullmatch(text):
        raise NotUnderstoodError("only integers, + - * << >> & | ^ ~ and parentheses are read")
    with reading():
        return _whole(syntax_tree(text))


def _shift_left(value: int, places: int) -> int:
    if places > MAX_BITS:
        raise NotUnderstoodError(f"a shift by {places} bits")
    return value << places


_SIGNS: Mapping[type[ast.unaryop], Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_RATIONAL: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_BITWISE: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.LShift: _shift_left,
    ast.RShift: operator.rshift,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
}


def _exact(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant():
            return Fraction(_integer(node))
        case ast.UnaryOp(op=sign, operand=operand) if type(sign) in _SIGNS:
            return Fraction(_SIGNS[type(sign)](_exact(operand)))
        case ast.BinOp(left=left, op=operation, right=right) if type(operation) in _RATIONAL:
            value = Fraction(_RATIONAL[type(operation)](_exact(left), _exact(right)))
            _check_size(value.numerator)
            _check_size(value.denominator)
            return value
    raise NotUnderstoodError(f"{ast.unparse(node)[:40]!r} is not + - * / of numbers")


def _whole(node: ast.expr) -> int:
    match node:
        case ast.Constant():
            return _integer(node)
        case ast.UnaryOp(op=ast.Invert(), operand=operand):
            return ~_whole(operand)
        case ast.UnaryOp(op=sign, operand=operand) if type(sign) in _SIGNS:
            return int(_SIGNS[type(sign)](_whole(operand)))
        case ast.BinOp(left=left, op=operation, right=right) if type(operation) in _BITWISE:
            value = int(_BITWISE[type(operation)](_whole(left), _whole(right)))
            _check_size(value)
            return value
    raise NotUnderstoodError(f"{ast.unparse(node)[:40]!r} is not arithmetic on integers")


def _integer(node: ast.Constant) -> int:
    if type(node.value) is not int:
        raise NotUnderstoodError(f"{node.value!r} is not an integer")
    return node.value


def _check_size(value: int) -> None:
    if value.bit_length() > MAX_BITS:
        raise NotUnderstoodError(f"a number of {value.bit_length()} bits")
