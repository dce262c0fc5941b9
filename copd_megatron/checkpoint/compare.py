"""Whether two runs are the same run: metrics, exported weights, final table. Imports neither torch nor
Megatron."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from copd_megatron.checkpoint.manifest import hash_file
from copd_megatron.errors import DataError
from copd_megatron.untrusted.json_text import kind_of, lines_of, load_object
from copd_megatron.untrusted.regular_file import open_regular

NOT_COMPARED = ("/timing/", "/perf/", "/media/")
"""Parts of metric names that tell how fast a run was, or what its caches held."""


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` without what is not compared. Raises DataError: a line is no step."""
    path = run_dir / "metrics.jsonl"
    found = []
    with open_regular(path) as file:
        for number, text, _ in lines_of(file, path):
            try:
                line = load_object(text)
                if type(line.get("step")) is not int:
                    raise ValueError(f"its step is {kind_of(line.get('step'))}")
            except ValueError as error:
                raise DataError(f"{path}, line {number} is no step of a run: {error}; remove it") from error
            found.append({k: v for k, v in line.items() if not any(part in f"/{k}" for part in NOT_COMPARED)})
    return found


def metric_differences(
    expected: Path, found: Path, *, relative: float = 0.0, first_step: int = 1
) -> list[str]:
    """How the metrics of ``found`` differ from those of ``expected``; empty: not at all.

    Args:
        relative: largest relative difference that counts as equal; 0: bit for bit.
        first_step: steps before it are not compared.
    """
    a, b = ([line for line in metrics_of(run) if line["step"] >= first_step] for run in (expected, found))
    if [line["step"] for line in a] != [line["step"] for line in b]:
        return [f"steps {[line['step'] for line in b]} instead of {[line['step'] for line in a]}"]
    problems = []
    for one, other in zip(a, b, strict=True):
        if list(one) != list(other):
            problems.append(f"step {one['step']}: metrics {sorted(set(one) ^ set(other))} in one run only")
        problems += [
            f"step {one['step']}: {name} is {other[name]!r}, expected {value!r}"
            for name, value in one.items()
            if name in other and not _equal(value, other[name], relative)
        ]
    return problems


def _equal(one: Any, other: Any, relative: float) -> bool:
    if one == other or not relative:
        return bool(one == other)
    numbers = isinstance(one, int | float) and isinstance(other, int | float)
    return numbers and math.isclose(one, other, rel_tol=relative, abs_tol=relative)


def file_differences(expected: Path, found: Path) -> list[str]:
    """How exports and final tables differ, byte for byte."""
    problems = []
    for part in ("export", "evaluation.json"):
        for path in sorted([expected / part, *(expected / part).rglob("*")]):
            if not path.is_file():
                continue
            twin = found / path.relative_to(expected)
            if not twin.is_file():
                problems.append(f"{twin} is missing")
            elif hash_file(twin) != hash_file(path):
                problems.append(f"{twin} is not {path}")
    return problems


def compare_runs(expected: Path, found: Path) -> list[str]:
    """Everything that differs between two finished runs; empty: the same, bit for bit."""
    return metric_differences(expected, found) + file_differences(expected, found)
