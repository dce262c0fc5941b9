"""Lists of strings and numbers, as Python writes them."""

from __future__ import annotations

import ast
import math
from typing import Any

from copd_megatron.rewards.parsing.syntax import NotUnderstoodError, reading, syntax_tree


def literal(text: str) -> Any:
    """A Python literal made of lists, tuples, strings, numbers, True, False and None.

    Raises NotUnderstoodError for anything else, and for a number that is too large for a float.
    """
    with reading():
        return _value(syntax_tree(text))


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=bool() | int() | float() | str() | None as value) if value != math.inf:
            return value
        case ast.List(elts=items):
            return [_value(item) for item in items]
        case ast.Tuple(elts=items):
            return tuple(_value(item) for item in items)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
    raise NotUnderstoodError(f"{type(node).__name__} is no part of a list of strings and numbers")
