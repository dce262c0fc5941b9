"""A run's metrics and evaluation table, read back from its run directory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from copd_megatron.errors import DataError
from copd_megatron.untrusted.json_text import lines_of, load_file, load_object, made
from copd_megatron.untrusted.regular_file import open_regular

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
        DataError: a line of it is not the metrics of a step, or ``evaluation.json`` is no table.
    """
    folder = Path(run_dir)
    rows = _rows(folder / "metrics.jsonl")
    steps = sorted(rows)
    names = dict.fromkeys(
        name for step in steps for name, value in rows[step].items() if _is_number(value) and name != "step"
    )
    evaluation = _evaluation(folder / "evaluation.json")
    return RunHistory(
        name=folder.resolve().name,
        steps=tuple(steps),
        phases=tuple(str(rows[step].get("phase", "")) for step in steps),
        series={name: tuple(_number(rows[step].get(name)) for step in steps) for name in names},
        accuracy=_accuracy(evaluation),
        domains=evaluation.domains,
        num_prompts=evaluation.num_prompts,
    )


@dataclass(frozen=True, kw_only=True)
class _Evaluation:
    """What of ``evaluation.json`` is used."""

    domains: tuple[str, ...] = ()
    num_prompts: Mapping[str, int] = field(default_factory=dict)
    accuracy: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    mean_reward: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)


def _evaluation(path: Path) -> _Evaluation:
    try:
        record = load_file(path)
        found = made(_Evaluation, {name: record[name] for name in _USED if name in record})
        shares = [share for row in found.accuracy.values() for share in row.values() if share is not None]
        if any(not 0.0 <= share <= 1.0 for share in shares):
            raise ValueError("an accuracy is no share, from 0 to 1")
        if any(count < 0 for count in found.num_prompts.values()):
            raise ValueError("a number of prompts is negative")
        return found
    except FileNotFoundError:
        return _Evaluation()
    except ValueError as error:
        raise DataError(f"{path} is no table of an evaluation ({error}): remove it") from error


_USED = tuple(item.name for item in fields(_Evaluation))


def _accuracy(evaluation: _Evaluation) -> dict[str, dict[str, float | None]]:
    return {
        model: dict(row)
        | {
            name: value
            for name, value in evaluation.mean_reward.get(model, {}).items()
            if value is not None and 0.0 <= value <= 1.0
        }
        for model, row in evaluation.accuracy.items()
    }


def _rows(path: Path) -> dict[int, dict[str, Any]]:
    """The metrics of each step, by step."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a run directory with at least one step")
    rows: dict[int, dict[str, Any]] = {}
    with open_regular(path) as file:
        for number, text, whole in lines_of(file, path):
            try:
                row = load_object(text)
                rows[made(_Step, {"step": row.get("step")}).step] = row
            except ValueError as error:
                if not whole:
                    break
                raise DataError(
                    f"{path}, line {number}: not the metrics of a step ({error}); remove the line"
                ) from error
    return rows


@dataclass(frozen=True)
class _Step:
    step: int


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
