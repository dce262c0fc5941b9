"""A run's metrics and evaluation table, read back from its run directory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Final

from copd_megatron.errors import DataError
from copd_megatron.untrusted.json_text import lines_of, load_file, load_object, made
from copd_megatron.untrusted.regular_file import open_regular

OVERLAP = "copd/overlap@"
SYMMETRIC_KL = "copd/sym_kl/"
TEACHER_GAP = "copd/teacher_gap/"
MERGED_ACCURACY = "copd/merged_accuracy/"
METRICS: Final = "metrics.jsonl"
MAX_SHOWN: Final = 100
"""Curves of one kind: more than can be told apart."""
MAX_NAMES: Final = 20_000
MAX_NAME_LETTERS: Final = 500
_MAX_STEP = _MAX_PROMPTS = 10**9


@dataclass(frozen=True, kw_only=True)
class RunHistory:
    """A run's metrics, one entry per step, and its table."""

    name: str
    steps: tuple[int, ...]
    phases: tuple[str, ...]
    """``rlvr`` or ``opd``, per step."""
    series: Mapping[str, tuple[float, ...]]
    """Metric name to its values, NaN at steps that have none. Values are laid out when they are asked for:
    together, those of metrics that most steps lack would be far larger than the file."""
    accuracy: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    """Model to domain to accuracy, or to the mean reward where a verifier gives partial credit and the mean
    lies in [0, 1]; empty until the run has ended."""
    domains: tuple[str, ...] = ()
    num_prompts: Mapping[str, int] = field(default_factory=dict)
    """Validation prompts of each domain."""
    table_step: int | None = None
    """Step at whose end the table was made; None: nobody knows."""

    @property
    def gone_on(self) -> str:
        """That the run has gone on since its table, and what it exported, were made; empty if it has not."""
        last = self.steps[-1] if self.steps else 0
        if self.table_step is None or last <= self.table_step:
            return ""
        return (
            f"{self.name}: the table and the exported models are of step {self.table_step}; the run has gone "
            f"on to step {last} since, and not come to its end"
        )

    def named(self, prefix: str, suffix: str = "") -> dict[str, tuple[float, ...]]:
        """Series whose names have this prefix and suffix, under the part between them; the first
        ``MAX_SHOWN``."""
        return self.renamed(
            lambda name: (
                name[len(prefix) : len(name) - len(suffix)]
                if name.startswith(prefix) and name.endswith(suffix)
                else None
            )
        )

    def renamed(self, rename: Callable[[str], str | None]) -> dict[str, tuple[float, ...]]:
        """Series under the names that ``rename`` gives them, the first ``MAX_SHOWN``; None leaves one out."""
        found = ((short, name) for name in self.series if (short := rename(name)) is not None)
        return {short: self.series[name] for short, name in islice(found, MAX_SHOWN)}

    def edge(self, pair: str) -> str:
        """``text-image``, as overlap and symmetric KL name a student and its teacher, in the form
        ``text<-image`` that other metrics use. Unchanged if it does not consist of two branch names."""
        for place, character in enumerate(pair):
            if character == "-" and {student := pair[:place], teacher := pair[place + 1 :]} <= self._branches:
                return f"{student}<-{teacher}"
        return pair

    @cached_property
    def _branches(self) -> set[str]:
        """What the names of series begin with."""
        return {name.partition("/")[0] for name in self.series} - {"copd"}


class _Series(Mapping[str, tuple[float, ...]]):
    """Metric name to its values at all steps, from those that exist."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._points: dict[str, list[tuple[int, float]]] = {}

    def add(self, name: str, place: int, value: float) -> None:
        """A value at the step of this place, from 0. Raises ValueError: the name, or their number, is none
        that a run has."""
        if name not in self._points and len(self._points) >= MAX_NAMES:
            raise ValueError(f"more than {MAX_NAMES} metrics")
        if len(name) > MAX_NAME_LETTERS:
            raise ValueError(f"the name {name[:40]!r}... is longer than {MAX_NAME_LETTERS} characters")
        self._points.setdefault(name, []).append((place, value))

    def __getitem__(self, name: str) -> tuple[float, ...]:
        values = [math.nan] * self._num_steps
        for place, value in self._points[name]:
            values[place] = value
        return tuple(values)

    def __iter__(self) -> Iterator[str]:
        return iter(self._points)

    def __len__(self) -> int:
        return len(self._points)


def read_run(run_dir: str | Path) -> RunHistory:
    """The history of a run directory.

    A step that occurs twice, because the run resumed before it, counts as it was written last. An incomplete
    last line, which a run leaves that is writing or was killed, is ignored.

    Raises:
        FileNotFoundError: there is no ``metrics.jsonl``.
        DataError: a line of it is not the metrics of a step, or ``evaluation.json`` is no table.
    """
    folder = Path(run_dir)
    rows = _rows(folder / METRICS)
    steps = sorted(rows)
    series = _Series(len(steps))
    for place, step in enumerate(steps):
        for name, value in rows[step].items():
            if _is_number(value) and name != "step":
                try:
                    series.add(name, place, float(value))
                except ValueError as error:
                    raise DataError(
                        f"{folder / METRICS}, step {step}: {error}; is it the file of a run?"
                    ) from error
    evaluation = _evaluation(folder / "evaluation.json")
    return RunHistory(
        name=folder.resolve().name,
        steps=tuple(steps),
        phases=tuple(str(rows[step].get("phase", "")) for step in steps),
        series=series,
        accuracy=_accuracy(evaluation),
        domains=evaluation.domains,
        num_prompts=evaluation.num_prompts,
        table_step=evaluation.step,
    )


@dataclass(frozen=True, kw_only=True)
class _Evaluation:
    """What of ``evaluation.json`` is used."""

    domains: tuple[str, ...] = ()
    num_prompts: Mapping[str, int] = field(default_factory=dict)
    accuracy: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    mean_reward: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    step: int | None = None


def _evaluation(path: Path) -> _Evaluation:
    try:
        record = load_file(path, inside=path.parent)
        found = made(_Evaluation, {name: record[name] for name in _USED if name in record})
        shares = [share for row in found.accuracy.values() for share in row.values() if share is not None]
        if any(not 0.0 <= share <= 1.0 for share in shares):
            raise ValueError("an accuracy is no share, from 0 to 1")
        if any(not 0 <= count <= _MAX_PROMPTS for count in found.num_prompts.values()):
            raise ValueError(f"a number of prompts is not from 0 to {_MAX_PROMPTS}")
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
    with open_regular(path, inside=path.parent) as file:
        for number, text, whole in lines_of(file, path):
            try:
                row = load_object(text)
                step = made(_Step, {"step": row.get("step")}).step
                if not 0 <= step <= _MAX_STEP:
                    raise ValueError(f"step is not from 0 to {_MAX_STEP}")
                rows[step] = row
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
