"""The hard pairs in ``tests/data``: one a line, ``verdict | gold | response``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_LINE = re.compile(r"([01]) \| (.*?) \|(.*)")
FOLDER = Path(__file__).parents[1] / "data"
FILES = ("math_pairs.txt", "independent_math_pairs.txt")
"""The second was written without a look at the first or at ``rewards/mathematics``, and graded for the first
time when it was complete: 3 of its right answers were refused, and no wrong one was taken. The verifier has
been mended since, so it is no longer a measure of what is unseen."""


@dataclass(frozen=True)
class Pair:
    """A gold answer, a response, and whether it is right."""

    gold: str
    response: str
    is_right: bool
    kind: str


def math_pairs(file: str = FILES[0]) -> list[Pair]:
    """A file's pairs, with the heading under which each stands. The sign ⏎ is a line break in a response."""
    pairs, kind = [], ""
    for line in (FOLDER / file).read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            kind = line[2:]
        elif line.strip():
            found = _LINE.fullmatch(line)
            assert found is not None, line
            verdict, gold, response = found.groups()
            pairs.append(Pair(gold, response.replace("⏎", "\n").strip(), verdict == "1", kind))
    return pairs
