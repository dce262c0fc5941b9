"""A run's metrics and evaluation table, read back from its run directory."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OVERLAP = "copd/overlap@"
SYMMETRIC_KL = "copd/sym_kl/"
TEACHER_GAP = "copd/teacher_gap/"
MERGED_ACCURACY = "copd/merged_accuracy/"


@dataclass(frozen=True, kw_only=True)
class RunHistory:
    """A run's metrics, one entry per step, and its table."""

    name: str
    steps: tuple[int, ...]
    phases: tuple[str, ...]
    """``rlvr`` or ``opd``, per step."""
    series: Mapping[str, tuple[float, ...]]
    """Metric name to its values, NaN at steps that have none."""
    accuracy: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    """Model to domain to accuracy, or to the mean reward where a verifier gives partial credit and the mean
    lies in [0, 1]; empty until the run has ended."""
    domains: tuple[str, ...] = ()
    num_prompts: Mapping[str, int] = field(default_factory=dict)
    """Validation prompts of each domain."""

    def named(self, prefix: str, suffix: str = "") -> dict[str, tuple[float, ...]]:
        """Series whose names have this prefix and suffix, under the part between them."""
        return {
            name[len(prefix) : len(name) - len(suffix)]: values
            for name, values in self.series.items()
            if name.startswith(prefix) and name.endswith(suffix)
        }

    def edge(self, pair: str) -> str:
        """``text-image``, as overlap and symmetric KL name a student and its teacher, in the form
        ``text<-image`` that other metrics use. Unchanged if it does not consist of two branch names."""
        branches = {name.partition("/")[0] for name in self.series} - {"copd"}
        for place, character in enumerate(pair):
            student, teacher = pair[:place], pair[place + 1 :]
            if character == "-" and student in branches and teacher in branches:
                return f"{student}<-{teacher}"
        return pair


def read_run(run_dir: str | Path) -> RunHistory:
    """The history of a run directory.

    A step that occurs twice, because the run resumed before it, counts as it was written last. An incomplete
    last line, which a run leaves that is writing or was killed, is ignored.

    Raises:
        FileNotFoundError: there is no ``metrics.jsonl``.
        ValueError: a line of it is not the metrics of a step.
    """
    folder = Path(run_dir)
    rows = _rows(folder / "metrics.jsonl")
    steps = sorted(rows)
    names = dict.fromkeys(
        name for step in steps for name, value in rows[step].items() if _is_number(value) and name != "step"
    )
    table = folder / "evaluation.json"
    evaluation = json.loads(table.read_text(encoding="utf-8")) if table.is_file() else {}
    return RunHistory(
        name=folder.resolve().name,
        steps=tuple(steps),
        phases=tuple(str(rows[step].get("phase", "")) for step in steps),
        series={name: tuple(_number(rows[step].get(name)) for step in steps) for name in names},
        accuracy=_accuracy(evaluation),
        domains=tuple(evaluation.get("domains", ())),
        num_prompts=evaluation.get("num_prompts", {}),
    )


def _accuracy(evaluation: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    graded = evaluation.get("mean_reward", {})
    return {
        model: row
        | {
            name: value
            for name, value in graded.get(model, {}).items()
            if value is not None and 0.0 <= value <= 1.0
        }
        for model, row in evaluation.get("accuracy", {}).items()
    }


def _rows(path: Path) -> dict[int, dict[str, Any]]:
    """The metrics of each step, by step."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a run directory with at least one step")
    rows: dict[int, dict[str, Any]] = {}
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows[int(row["step"])] = row
        except (ValueError, KeyError, TypeError) as error:
            if not line.endswith("\n"):
                break
            raise ValueError(f"{path}, line {number}: not the metrics of a step ({error!r})") from error
    return rows


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
