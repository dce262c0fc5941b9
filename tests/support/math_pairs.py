"""The hard pairs of ``tests/data/math_pairs.txt``: one a line, ``verdict | gold | response``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_LINE = re.compile(r"([01]) \| (.*?) \|(.*)")
FILE = Path(__file__).parents[1] / "data" / "math_pairs.txt"


@dataclass(frozen=True)
class Pair:
    """A gold answer, a response, and whether it is right."""

    gold: str
    response: str
    is_right: bool
    kind: str


def math_pairs() -> list[Pair]:
    """All pairs, with the heading under which each stands. The sign ⏎ is a line break in a response."""
    pairs, kind = [], ""
    for line in FILE.read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            kind = line[2:]
        elif line.strip():
            found = _LINE.fullmatch(line)
            assert found is not None, line
            verdict, gold, response = found.groups()
            pairs.append(Pair(gold, response.replace("⏎", "\n").strip(), verdict == "1", kind))
    return pairs
