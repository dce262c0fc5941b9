"""The paper's table: its benchmarks by group, its published figures, and beneath them the user's.

``paper.yaml`` holds what is published; a figure that does not stand there is shown as ``-``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import yaml

from copd_megatron.errors import ConfigError
from copd_megatron.evaluation.show import Table

AVERAGE = "average"
"""Column with the plain mean of a group's benchmarks."""

Shares = Mapping[str, Mapping[str, float]]
"""Model to benchmark to accuracy in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class Paper:
    """A paper's main table."""

    columns: Mapping[str, Sequence[str]]
    """Group to its benchmarks, in the paper's order."""
    rows: Mapping[str, Mapping[str, Mapping[str, float]]]
    """Method to group to benchmark (or ``average``) to per cent; what is not published is left out."""

    @property
    def benchmarks(self) -> frozenset[str]:
        """Of all groups."""
        return frozenset(name for names in self.columns.values() for name in names)


def published() -> Paper:
    """The paper on co-evolving policy distillation."""
    return read_paper((files("copd_megatron.evaluation") / "paper.yaml").read_text(encoding="utf-8"))


def read_paper(text: str) -> Paper:
    """A paper's table in YAML.

    Raises:
        ConfigError: a row names a group or column that the table does not have, or holds no percentage.
    """
    held = yaml.safe_load(text)
    paper = Paper(columns=held["columns"], rows=held["rows"])
    for method, groups in paper.rows.items():
        for group, figures in groups.items():
            for column, figure in figures.items():
                _check(paper, (method, group, column), figure)
    return paper


def paper_tables(paper: Paper, measured: Shares) -> list[Table]:
    """A table for each group of which the models have answered a benchmark: the published rows that have a
    figure there, then the models. In per cent."""
    return [
        _table(paper, group, names, measured)
        for group, names in paper.columns.items()
        if any(name in row for row in measured.values() for name in names)
    ]


def _table(paper: Paper, group: str, names: Sequence[str], measured: Shares) -> Table:
    columns = [*names, AVERAGE]
    theirs = {f"{method} (paper)": row[group] for method, row in paper.rows.items() if row.get(group)}
    ours = {model: _with_average(row, names) for model, row in measured.items()}
    return Table(
        title=f"{group} benchmarks, accuracy (%)",
        header=["model", *columns],
        rows=[
            [name, *(f"{row[column]:.2f}" if column in row else "-" for column in columns)]
            for name, row in [*theirs.items(), *ours.items()]
        ],
    )


def _with_average(shares: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """In per cent, with the mean over the group where all of it was measured."""
    found = {name: 100 * shares[name] for name in names if not math.isnan(shares.get(name, math.nan))}
    average = {AVERAGE: math.fsum(found.values()) / len(names)} if len(found) == len(names) else {}
    return found | average


def _check(paper: Paper, place: tuple[str, str, str], figure: Any) -> None:
    _, group, column = place
    where = f"paper.yaml, rows.{'.'.join(place)}"
    if column not in _columns(paper, group):
        known = ", ".join(_columns(paper, group)) or "no group of that name"
        raise ConfigError(f"{where}: not a column of the table ({known}). Add it to columns, or correct it.")
    if isinstance(figure, bool) or not isinstance(figure, int | float) or not 0 <= figure <= 100:
        raise ConfigError(f"{where}: {figure!r} is not a percentage. Give a number from 0 to 100.")


def _columns(paper: Paper, group: str) -> Iterator[str]:
    if group in paper.columns:
        yield from paper.columns[group]
        yield AVERAGE
