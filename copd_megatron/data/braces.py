"""Brace ranges of shard patterns, counted before anything is expanded.

``{0..3000000}`` is short, and as a list it takes hundreds of megabytes; ``{0..9}`` twenty times over would
never end. A pattern may come from a received configuration.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator
from typing import Final

import braceexpand

MAX_ALTERNATIVES: Final = 100_000
"""Names that one pattern may stand for."""
_ALPHABET: Final = string.ascii_uppercase + string.ascii_lowercase
_NUMBERS = re.compile(r"^(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?$")
_LETTERS = re.compile(r"^([A-Za-z])\.\.([A-Za-z])(?:\.\.-?(\d+))?$")
_MAX_LETTERS = 1 << 16
_MAX_RANGE_LETTERS = 60
_MAX_NESTING = 16


def alternatives(pattern: str) -> Iterator[str]:
    """The names that a pattern stands for, in order, made one at a time.

    Raises:
        ValueError: braces are not closed, or it stands for more than ``MAX_ALTERNATIVES`` names.
    """
    if len(pattern) > _MAX_LETTERS:
        raise ValueError(f"it is longer than {_MAX_LETTERS} characters")
    if count(pattern) > MAX_ALTERNATIVES:
        raise ValueError(f"it stands for more than {MAX_ALTERNATIVES} names")
    found: Iterator[str] = braceexpand.braceexpand(pattern)
    return found


def count(pattern: str, nesting: int = 0) -> int:
    """How many names a pattern stands for, by the rules of ``braceexpand``, without expanding it.

    Raises:
        ValueError: braces are not closed, or a range or the nesting has no sensible size.
    """
    if nesting > _MAX_NESTING:
        raise ValueError(f"it nests braces more than {_MAX_NESTING} levels deep")
    found, begin = 1, 0
    for place, letter, depth in _walk(pattern):
        if letter == "{" and depth == 1:
            begin = place + 1
        elif letter == "}" and depth == 0:
            found *= _count_group(pattern[begin:place], nesting)
    return found


def _count_group(inner: str, nesting: int) -> int:
    """Of what stands between two braces."""
    numbers = _NUMBERS.match(inner)
    letters = _LETTERS.match(inner)
    if (numbers or letters) and len(inner) > _MAX_RANGE_LETTERS:
        raise ValueError(f"the range {{{inner[:20]}... is longer than {_MAX_RANGE_LETTERS} characters")
    if numbers:
        first, last, step = numbers.groups()
        return abs(int(last) - int(first)) // (int(step or 1) or 1) + 1
    if letters:
        first, last, step = letters.groups()
        return abs(_ALPHABET.index(last) - _ALPHABET.index(first)) // (int(step or 1) or 1) + 1
    commas = [place for place, letter, depth in _walk(inner) if letter == "," and depth == 0]
    begins, ends = [0, *(place + 1 for place in commas)], [*commas, len(inner)]
    return sum(count(inner[begin:end], nesting + 1) for begin, end in zip(begins, ends, strict=True))


def _walk(text: str) -> Iterator[tuple[int, str, int]]:
    """Braces and commas that count, with their places and how many braces are open behind them."""
    depth, place = 0, 0
    while place < len(text):
        letter = text[place]
        if letter == "\\":
            place += 2
            continue
        depth += (letter == "{") - (letter == "}")
        if depth < 0:
            break
        if letter in "{},":
            yield place, letter, depth
        place += 1
    if depth != 0:
        raise ValueError(f"unbalanced braces in {text[:60]!r}")
