"""Unicode normalisation in time that grows with the text."""

from __future__ import annotations

import unicodedata
from typing import Final

MAX_MARKS: Final = 30
"""Combining marks in a row that Unicode's stream-safe text format allows (UAX #15, section 13)."""
_JOINER: Final = "\u034f"


def nfkc(text: str) -> str:
    """The compatibility form of a text.

    Normalisation sorts each run of combining marks, in time that grows with the square of its length: of a
    hundred thousand marks, for minutes. Runs beyond ``MAX_MARKS``, which no language has, are broken by a
    grapheme joiner first, as the stream-safe format does.
    """
    return text if text.isascii() else unicodedata.normalize("NFKC", _stream_safe(text))


def _stream_safe(text: str) -> str:
    parts: list[str] = []
    begin = marks = 0
    for place, letter in enumerate(text):
        if not unicodedata.combining(letter):
            marks = 0
            continue
        marks += 1
        if marks > MAX_MARKS:
            parts += [text[begin:place], _JOINER]
            begin, marks = place, 1
    return "".join([*parts, text[begin:]])
