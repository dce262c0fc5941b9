"""What the page of a run, or of several, shows as curves: which metrics, on which scale. Pure; nothing is
drawn here.

Several runs (seeds of one experiment, say) become one curve, their mean, with a band from the lowest to the
highest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from copd_megatron.evaluation.statistics import wilson
from copd_megatron.metrics.step_clock import PARTS
from copd_megatron.report.history import (
    MAX_SHOWN,
    MERGED_ACCURACY,
    OVERLAP,
    SYMMETRIC_KL,
    TEACHER_GAP,
    RunHistory,
)

PHASES = {part.replace("_", " "): f"{part}_seconds" for part in PARTS}
"""Parts of a step, in the order in which they are stacked, and their metrics."""
_SHOWN_PARTS = 8
_FEW_STEPS = 40
"""Runs of at most so many steps are drawn as they are; longer ones smoothed, with the raw curve behind."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A line over steps; NaN where there is no value."""

    label: str
    steps: tuple[int, ...]
    values: tuple[float, ...]
    low: tuple[float, ...] | None = None
    """Lower edge of the band around it; None: it has none."""
    high: tuple[float, ...] | None = None
    points: tuple[int, ...] = ()
    """How many points each of several runs gives; empty for a single run."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One set of axes."""

    title: str
    curves: Sequence[Curve]
    help: str = ""
    """How to read it, in a sentence."""
    limits: tuple[float, float] | None = None
    from_zero: bool = False
    """The axis starts at 0, for quantities that cannot be less; ``limits`` come first."""
    log: bool = False
    reference: float | None = None
    """A horizontal line to compare with."""
    stacked: bool = False
    """The curves are parts of a whole, one upon the other."""

    @property
    def coverage(self) -> str:
        """What the means over several runs are not of: runs without the curve, points that some lack."""
        parts = []
        for curve in self.curves:
            have = [count for count in curve.points if count]
            if have and len(have) < len(curve.points):
                parts.append(f"{curve.label}: {len(have)} of {len(curve.points)} runs")
            if have and min(have) < max(have):
                parts.append(f"{curve.label}: {min(have)} to {max(have)} points a run")
        more = [f"and {len(parts) - _SHOWN_PARTS} more"] if len(parts) > _SHOWN_PARTS else []
        notes = ["; ".join([*parts[:_SHOWN_PARTS], *more]) + "."] if parts else []
        if len(self.curves) >= MAX_SHOWN:
            notes.append(f"At most {MAX_SHOWN} curves are shown.")
        return " ".join(notes)


@dataclass(frozen=True, kw_only=True)
class PhaseSpan:
    """A stretch of steps in Phase II, both ends included."""

    first: int
    last: int


def panels(runs: Sequence[RunHistory]) -> list[Panel]:
    """All panels that have a curve."""
    found = [
        _rewards(runs),
        _pool_rewards(runs),
        _validation(runs),
        _overlap(runs),
        _symmetric_kl(runs),
        _teacher_gap(runs),
        _plain(
            runs,
            "entropy",
            "entropy of the policy (nats)",
            "Near 0 early: exploration is over.",
            from_zero=True,
        ),
        _plain(runs, "response_length", "length of own responses (tokens)", "", from_zero=True),
        _plain(
            runs,
            "truncated_fraction",
            "share of responses cut at their limit",
            "High: raise max_new_tokens.",
            from_zero=True,
        ),
        _plain(runs, "grad_norm", "gradient norm before clipping", "", log=True),
        _ahead(runs),
        *_times(runs),
    ]
    return [panel for panel in found if panel.curves]


def phase_spans(run: RunHistory) -> list[PhaseSpan]:
    """Where Phase II (OPD) was."""
    spans: list[PhaseSpan] = []
    for step, phase in zip(run.steps, run.phases, strict=True):
        if phase != "opd":
            continue
        if spans and spans[-1].last == step - 1:
            spans[-1] = PhaseSpan(first=spans[-1].first, last=step)
        else:
            spans.append(PhaseSpan(first=step, last=step))
    return spans


def combined(runs: Sequence[RunHistory], named: Sequence[Mapping[str, Sequence[float]]]) -> list[Curve]:
    """One curve for each name: a run's own, or the mean over runs with a band from lowest to highest.

    Args:
        named: the series of each run by label.
    """
    steps = tuple(sorted({step for run in runs for step in run.steps}))
    return [_combined(label, steps, runs, named) for label in dict.fromkeys(n for one in named for n in one)]


def _combined(
    label: str,
    steps: tuple[int, ...],
    runs: Sequence[RunHistory],
    named: Sequence[Mapping[str, Sequence[float]]],
) -> Curve:
    at: dict[int, list[float]] = {step: [] for step in steps}
    points = [0] * len(runs)
    for place, (run, series) in enumerate(zip(runs, named, strict=True)):
        for step, value in zip(run.steps, series.get(label, ()), strict=False):
            if not math.isnan(value):
                at[step].append(value)
                points[place] += 1
    mean = tuple(math.fsum(v) / len(v) if v else math.nan for v in at.values())
    if len(runs) == 1:
        return Curve(label=label, steps=steps, values=mean)
    return Curve(
        label=label,
        steps=steps,
        values=mean,
        low=tuple(min(v, default=math.nan) for v in at.values()),
        high=tuple(max(v, default=math.nan) for v in at.values()),
        points=tuple(points),
    )


def smoothed(values: Sequence[float]) -> tuple[float, ...]:
    """A centred moving mean over about a twentieth of a long run; a short one as it is."""
    if len(values) <= _FEW_STEPS:
        return tuple(values)
    half = max(1, len(values) // 40)
    means = []
    for place in range(len(values)):
        near = [v for v in values[max(0, place - half) : place + half + 1] if not math.isnan(v)]
        means.append(math.fsum(near) / len(near) if near else math.nan)
    return tuple(means)


def _rewards(runs: Sequence[RunHistory]) -> Panel:
    curves = combined(runs, [run.named("", "/train/reward") for run in runs])
    return Panel(
        title="reward on the branch's own prompts",
        curves=curves,
        help="Mean grade of a step's responses; Phase II is shaded.",
        limits=_unit_interval(curves),
    )


def _around(run: RunHistory, marker: str, joint: str) -> dict[str, tuple[float, ...]]:
    """Series with ``marker`` in their names, by what stands before it and behind it."""
    return run.renamed(lambda name: joint.join(name.split(marker, 1)) if marker in name else None)


def _pool_rewards(runs: Sequence[RunHistory]) -> Panel:
    """Of branches that draw from several pools, the reward on each."""
    curves = combined(runs, [_around(run, "/train/reward/", ": ") for run in runs])
    return Panel(
        title="reward by pool",
        curves=curves,
        help="Of branches that draw their prompts from several pools.",
        limits=_unit_interval(curves),
    )


def _validation(runs: Sequence[RunHistory]) -> Panel:
    """Accuracy on each domain during training: of a branch on its own domain, and on the others."""
    named = [
        _around(run, "/validation/accuracy/", " on ")
        | {f"merged on {domain}": values for domain, values in run.named(MERGED_ACCURACY).items()}
        for run in runs
    ]
    curves = combined(runs, named)
    if len(runs) == 1:
        curves = [_with_interval(curve, runs[0]) for curve in curves]
    return Panel(
        title="validation accuracy during training",
        curves=curves,
        help="Bands: 95 % intervals, from the number of prompts." if len(runs) == 1 else "",
        limits=_unit_interval(curves),
    )


def _with_interval(curve: Curve, run: RunHistory) -> Curve:
    """Wilson's interval at each point, where the number of prompts is known and the values are shares."""
    count = run.num_prompts.get(curve.label.rpartition(" on ")[2], 0)
    if not count or any(v < 0 or v > 1 for v in curve.values):
        return curve
    bounds = [None if math.isnan(v) else wilson(round(v * count), count) for v in curve.values]
    return Curve(
        label=curve.label,
        steps=curve.steps,
        values=curve.values,
        low=tuple(math.nan if b is None else b.low for b in bounds),
        high=tuple(math.nan if b is None else b.high for b in bounds),
    )


def _overlap(runs: Sequence[RunHistory]) -> Panel:
    measured = [run.named(OVERLAP) for run in runs]  # "10/text-image"
    top_k = next((name.partition("/")[0] for one in measured for name in one), "k")
    named = [
        {run.edge(name.partition("/")[2]): values for name, values in one.items()}
        for run, one in zip(runs, measured, strict=True)
    ]
    curves = combined(runs, named)
    lowest = min((v for curve in curves for v in curve.values if not math.isnan(v)), default=1.0)
    return Panel(
        title=f"overlap@{top_k}, student<-teacher (Fig. 4a)",
        curves=curves,
        help="Shared most probable tokens on states the student visits; 0.9 is what the paper's runs keep.",
        limits=(0.0 if lowest < 0.5 else 0.5, 1.01),
        reference=0.9,
    )


def _symmetric_kl(runs: Sequence[RunHistory]) -> Panel:
    named = [{run.edge(pair): values for pair, values in run.named(SYMMETRIC_KL).items()} for run in runs]
    return Panel(
        title="symmetric KL (nats), student<-teacher (Fig. 4b)",
        curves=combined(runs, named),
        help="A steady rise means that branches drift apart.",
        log=True,
    )


def _teacher_gap(runs: Sequence[RunHistory]) -> Panel:
    return Panel(
        title="teacher gap: log p(teacher) - log p(student)",
        curves=combined(runs, [run.named(TEACHER_GAP) for run in runs]),
        help="Mean over the student's tokens; slightly negative, since the student sampled them.",
        reference=0.0,
    )


def _plain(
    runs: Sequence[RunHistory],
    metric: str,
    title: str,
    note: str,
    *,
    log: bool = False,
    from_zero: bool = False,
) -> Panel:
    named = [run.named("", f"/train/{metric}") for run in runs]
    return Panel(title=title, curves=combined(runs, named), help=note, log=log, from_zero=from_zero)


def _ahead(runs: Sequence[RunHistory]) -> Panel:
    """Only of runs with ``opd.max_teacher_lag``."""
    return Panel(
        title="steps ahead of the slowest branch",
        curves=combined(runs, [run.named("", "/perf/steps_ahead") for run in runs]),
        help="At the beginning of the step. A branch that is always ahead is the faster one.",
        from_zero=True,
    )


def _times(runs: Sequence[RunHistory]) -> list[Panel]:
    """Where each branch's seconds went; of several runs, the first one's."""
    run = runs[0]
    return [
        Panel(
            title=f"seconds of a step: {branch}",
            curves=[
                Curve(label=label, steps=run.steps, values=values)
                for label, values in _parts(run, branch).items()
            ],
            help="Means over the branch's ranks. The stack adds up to the step.",
            stacked=True,
        )
        for branch in run.named("", "/timing/step_seconds")
    ]


def _parts(run: RunHistory, branch: str) -> dict[str, tuple[float, ...]]:
    """Seconds of each part, of those that took any."""
    parts = {
        label: tuple(0.0 if math.isnan(v) else v for v in run.series[f"{branch}/timing/{metric}"])
        for label, metric in PHASES.items()
        if f"{branch}/timing/{metric}" in run.series
    }
    return {label: values for label, values in parts.items() if any(values)}


def _unit_interval(curves: Sequence[Curve]) -> tuple[float, float] | None:
    """The whole range of a verifier's grade, unless values lie outside it."""
    values = [v for curve in curves for v in curve.values if not math.isnan(v)]
    return (-0.02, 1.02) if values and min(values) >= 0 and max(values) <= 1 else None
