"""Text from a file, a model, a message or a user's data, made harmless for a terminal.

A terminal obeys what is printed: escape sequences move the cursor, rewrite earlier lines, change the title or
fill the clipboard, and signs for the direction of writing show a line in another order than it has.
"""

from __future__ import annotations

import re

_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def visible(text: str) -> str:
    """Text whose control characters, line breaks and tabs apart, are written as ``\\x1b``. Halves of
    surrogate pairs, which no terminal can be sent, are written as ``\\udc80``."""
    return _CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


def visible_json(text: str) -> str:
    """JSON of equal value without control characters: they stand in strings only, and are escaped there."""
    return _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
