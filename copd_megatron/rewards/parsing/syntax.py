"""One bounded call of Python's parser, shared by all readers."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

MAX_CHARACTERS = 20_000
"""Longest text that is read. A grid of 50 x 50 quoted characters has 15,000."""
MAX_NODES = 10_000
"""Most nodes of a syntax tree. Every row of a grid and every one of its cells is a node."""


class NotUnderstoodError(ValueError):
    """The text is not of the kind that the reader accepts, or exceeds a bound."""


def syntax_tree(text: str) -> ast.expr:
    """The syntax tree of one Python expression. Parses only; nothing is evaluated.

    Raises NotUnderstoodError: not an expression, or longer or more deeply nested than the bounds.
    """
    if len(text) > MAX_CHARACTERS:
        raise NotUnderstoodError(f"{len(text)} characters, more than {MAX_CHARACTERS}")
    with reading(), warnings.catch_warnings(action="ignore"):  # SyntaxWarning: "1 is not callable"
        tree = ast.parse(text.strip(), mode="eval").body
        num_nodes = sum(1 for _ in ast.walk(tree))
    if num_nodes > MAX_NODES:
        raise NotUnderstoodError(f"{num_nodes} nodes, more than {MAX_NODES}")
    return tree


@contextmanager
def reading() -> Iterator[None]:
    """Turns what a hostile text can make Python's parser, or a walk over its tree, raise into
    NotUnderstoodError: bad syntax, NUL characters, lone surrogates, numbers of too many digits, too many
    levels."""
    try:
        yield
    except NotUnderstoodError:
        raise
    except (ArithmeticError, MemoryError, RecursionError, SyntaxError, TypeError, ValueError) as error:
        raise NotUnderstoodError(f"{type(error).__name__}: {error}"[:200]) from error
