"""How alike the branches of a run stayed, as text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from copd_megatron.report.history import MAX_SHOWN, OVERLAP, SYMMETRIC_KL, RunHistory

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 40


def behaviour_lines(history: RunHistory) -> str:
    """One line for every pair of student and teacher and every measure: the first values, the last values and
    the curve between them.

    First and last are means over a tenth of the measurements. Empty if the run measured none.
    """
    header = ["student<-teacher", "measure", "first", "last", "over the run"]
    lines: list[list[str]] = []
    for name in history.series:
        if name.startswith(OVERLAP):
            measure, _, pair = name.removeprefix("copd/").partition("/")
        elif name.startswith(SYMMETRIC_KL):
            measure, pair = "symmetric KL", name.removeprefix(SYMMETRIC_KL)
        else:
            continue
        if len(lines) >= MAX_SHOWN:
            break
        known = [value for value in history.series[name] if not math.isnan(value)]
        few = max(1, len(known) // 10)
        first, last = math.fsum(known[:few]) / few, math.fsum(known[-few:]) / few
        lines.append([history.edge(pair), measure, f"{first:.3f}", f"{last:.3f}", sparkline(known)])
    return _aligned([header, *sorted(lines)]) if lines else ""


def _aligned(lines: list[list[str]]) -> str:
    """Columns of equal width, numbers to the right, a rule below the header."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.rjust(width) if index in (2, 3) else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def sparkline(values: Sequence[float]) -> str:
    """Values as bars between their minimum and maximum, averaged to at most 40 bars."""
    count = min(len(values), _WIDTH)
    means = []
    for index in range(count):
        part = values[index * len(values) // count : (index + 1) * len(values) // count]
        means.append(math.fsum(part) / len(part))
    if not means:
        return ""
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] for value in means)
