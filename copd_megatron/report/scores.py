"""The table of accuracies of a run, or of several, with intervals, best and worst, and paired differences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from copd_megatron.config.domains import MEAN_COLUMN
from copd_megatron.evaluation.statistics import Estimate, wilson
from copd_megatron.report.history import RunHistory

_T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145),
    *(2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048),
    *(2.045, 2.042),
)
"""97.5 % quantiles of Student's t with 1, 2, ... 30 degrees of freedom."""


@dataclass(frozen=True, kw_only=True)
class ScoreTable:
    """Model to domain (and ``mean``) to a figure with its interval, as shares."""

    models: Sequence[str]
    domains: Sequence[str]
    cells: Mapping[str, Mapping[str, Estimate]]
    differences: Mapping[str, Mapping[str, Estimate]]
    """Model to domain to its difference from ``base``, run by run; empty for a single run."""
    num_runs: int
    """Runs that have a table."""
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Model to domain to the number of runs behind its cell."""
    difference_counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    num_prompts: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Domain to the numbers of validation prompts that runs have, each once, in order."""

    def note(self, model: str, domain: str) -> str:
        """How many runs a cell is of, where it is not of all."""
        return self._of(self.counts, model, domain)

    def difference_note(self, model: str, domain: str) -> str:
        """The same of a difference."""
        return self._of(self.difference_counts, model, domain)

    def _of(self, counts: Mapping[str, Mapping[str, int]], model: str, domain: str) -> str:
        count = counts.get(model, {}).get(domain, 0)
        return "" if count in (0, self.num_runs) else f"{count} of {self.num_runs} runs"

    def prompts(self, domain: str) -> str:
        """``n=40``, or ``n=8 to 40`` where runs differ; empty where nobody knows."""
        known = self.num_prompts.get(domain, ())
        if not known:
            return ""
        return f"n={known[0]}" if len(known) == 1 else f"n={known[0]} to {known[-1]}"

    @property
    def prompts_differ(self) -> list[str]:
        """Domains of which runs have different numbers of validation prompts."""
        return [domain for domain, known in self.num_prompts.items() if len(known) > 1]

    def cell(self, model: str, domain: str) -> Estimate | None:
        """None where the model was not measured."""
        return self.cells.get(model, {}).get(domain)

    def rank(self, model: str, domain: str) -> str:
        """``best``, ``worst`` or nothing, among the models of a column."""
        values = [cell.value for m in self.models if (cell := self.cell(m, domain)) is not None]
        mine = self.cell(model, domain)
        if mine is None or len(values) < 2 or min(values) == max(values):
            return ""
        return {max(values): "best", min(values): "worst"}.get(mine.value, "")


def score_table(runs: Sequence[RunHistory]) -> ScoreTable | None:
    """The runs' tables together; None where no run has one."""
    measured = [run for run in runs if run.accuracy]
    if not measured:
        return None
    models = list(dict.fromkeys(model for run in measured for model in run.accuracy))
    domains = list(dict.fromkeys(domain for run in measured for domain in run.domains))
    cells: dict[str, dict[str, Estimate]] = {model: {} for model in models}
    differences: dict[str, dict[str, Estimate]] = {}
    counts: dict[str, dict[str, int]] = {model: {} for model in models}
    difference_counts: dict[str, dict[str, int]] = {}
    for model in models:
        for domain in [*domains, MEAN_COLUMN]:
            values = _values(measured, model, domain)
            if values:
                single = len(measured) == 1
                counts[model][domain] = len(values)
                cells[model][domain] = (
                    _of_one(measured[0], domain, values[0]) if single else _share(interval(values))
                )
            paired = _against_base(measured, model, domain)
            if len(paired) > 1:
                differences.setdefault(model, {})[domain] = interval(paired)
                difference_counts.setdefault(model, {})[domain] = len(paired)
    prompts = {domain: {run.num_prompts.get(domain, 0) for run in measured} - {0} for domain in domains}
    return ScoreTable(
        models=models,
        domains=domains,
        cells=cells,
        differences=differences,
        num_runs=len(measured),
        counts=counts,
        difference_counts=difference_counts,
        num_prompts={domain: sorted(known) for domain, known in prompts.items() if known},
    )


def interval(values: Sequence[float]) -> Estimate:
    """Mean of a few runs with Student's 95 % interval; without width for a single one."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return Estimate(value=mean, low=mean, high=mean)
    quantile = _T95[len(values) - 2] if len(values) - 2 < len(_T95) else 1.96
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(value=mean, low=mean - half, high=mean + half)


def _share(found: Estimate) -> Estimate:
    """The interval of a share, which does not leave [0, 1]."""
    return Estimate(value=found.value, low=max(0.0, found.low), high=min(1.0, found.high))


def _values(runs: Sequence[RunHistory], model: str, domain: str) -> list[float]:
    found = [run.accuracy.get(model, {}).get(domain) for run in runs]
    return [value for value in found if value is not None]


def _against_base(runs: Sequence[RunHistory], model: str, domain: str) -> list[float]:
    """The model's gain over its own run's base, where both were measured."""
    if model == "base":
        return []
    pairs = [
        (run.accuracy.get(model, {}).get(domain), run.accuracy.get("base", {}).get(domain)) for run in runs
    ]
    return [ours - theirs for ours, theirs in pairs if ours is not None and theirs is not None]


def _of_one(run: RunHistory, domain: str, value: float) -> Estimate:
    """Wilson's interval from the number of prompts; for the mean, as if each domain varied by itself."""
    if domain != MEAN_COLUMN:
        count = run.num_prompts.get(domain, 0)
        return wilson(round(value * count), count) if count else Estimate(value=value, low=value, high=value)
    counts = [run.num_prompts.get(name, 0) for name in run.domains]
    if not all(counts):
        return Estimate(value=value, low=value, high=value)
    half = 1.96 * math.sqrt(sum(value * (1 - value) / count for count in counts)) / len(counts)
    return Estimate(value=value, low=max(0.0, value - half), high=min(1.0, value + half))
