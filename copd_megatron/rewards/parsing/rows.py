"""Lists and grids, as models write them: in Python's or JSON's notation, or in plain lines."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from copd_megatron.rewards.final_answer import normalize
from copd_megatron.rewards.parsing.literals import literal
from copd_megatron.rewards.parsing.syntax import MAX_CHARACTERS, NotUnderstoodError

_NUMBER = re.compile(r"[+-]?(?:\d{1,300}\.?\d{0,300}|\.\d{1,300})(?:[eE][+-]?\d{1,3})?", re.ASCII)
_ENUMERATED = re.compile(r"\s*(?:[-*\u2022]|\d{1,3}[.)])\s+")
_MARKDOWN_RULE = re.compile(r"[|\s:-]*-[|\s:-]*")
_ATOMS = (str, int, float, bool, type(None))


def read_items(text: str) -> list[str]:
    """The items of a list: ``[1, "b"]``, ``1, b`` or one item a line, perhaps with bullets or numbers.

    Raises NotUnderstoodError: an item that is a list itself, or too long a text.
    """
    value = _notation(text)
    if value is None:
        lines = [line for line in text.strip().split("\n") if line.strip()]
        if len(lines) == 1:
            return [item.strip() for item in lines[0].split(",") if item.strip()]
        return [_ENUMERATED.sub("", line, count=1).strip() for line in lines]
    return [_atom(item) for item in value]


def read_grid(text: str) -> list[list[str]]:
    """The rows of a grid: ``[[1, 2], [3, 4]]``, or one row a line, with cells between bars, commas or blanks.
    A line of one word of several characters is read character by character.

    Raises NotUnderstoodError: rows of different lengths, no cell at all, or too long a text.
    """
    value = _notation(text)
    if value is None:
        rows = [_cells(line) for line in text.strip().split("\n") if line.strip(" \t|")]
        rows = [row for row in rows if row]
    else:
        if not all(isinstance(row, list | tuple | str) for row in value):
            raise NotUnderstoodError("a list, and no grid")
        rows = [[_atom(cell) for cell in row] for row in value]
    if not rows or not rows[0] or any(len(row) != len(rows[0]) for row in rows):
        raise NotUnderstoodError("no grid: no cell, or rows of different lengths")
    return rows


def same_item(first: str, second: str) -> bool:
    """Whether two items are the same number, or the same text up to what ``normalize`` drops."""
    one, other = normalize(first), normalize(second)
    if one == other:
        return True
    if _NUMBER.fullmatch(one) and _NUMBER.fullmatch(other):
        return math.isclose(float(one), float(other), rel_tol=1e-9, abs_tol=0.0)
    return False


def _notation(text: str) -> list[Any] | tuple[Any, ...] | None:
    """What a text in brackets says; None for a text without."""
    stripped = text.strip()
    if len(stripped) > MAX_CHARACTERS:
        raise NotUnderstoodError(f"{len(stripped)} characters, more than {MAX_CHARACTERS}")
    if not (stripped.startswith(("[", "(")) and stripped.endswith(("]", ")"))):
        return None
    try:
        value = json.loads(stripped)
    except (ValueError, RecursionError):
        value = literal(stripped)
    if not isinstance(value, list | tuple):
        raise NotUnderstoodError("no list")
    return value


def _atom(value: object) -> str:
    if not isinstance(value, _ATOMS):
        raise NotUnderstoodError(f"{type(value).__name__} is no item")
    if isinstance(value, float) and not math.isfinite(value):
        raise NotUnderstoodError("a number that is not finite")
    return str(value)


def _cells(line: str) -> list[str]:
    if "|" in line:
        if _MARKDOWN_RULE.fullmatch(line):
            return []
        return [cell.strip() for cell in line.strip().strip("|").split("|")]
    cells = [cell for cell in re.split(r"[,\s]+", line.strip().strip("[],")) if cell]
    return list(cells[0]) if len(cells) == 1 else cells
