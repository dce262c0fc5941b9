"""A run's curves and accuracies as one picture, ``report.png``. ``copd report`` and the end of a run draw
it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from copd_megatron.config.domains import MEAN_COLUMN
from copd_megatron.report.behaviour import behaviour_lines
from copd_megatron.report.history import OVERLAP, SYMMETRIC_KL, TEACHER_GAP, RunHistory, read_run
from copd_megatron.report.names import figure_text
from copd_megatron.report.panels import phase_spans
from copd_megatron.untrusted.whole_file import replacing

_COLORS = ("C0", "C1", "C2", "C3", "C4", "C5", "C6", "C8", "C9")
_BASE_COLOR, _MERGED_COLOR = "0.65", "0.15"
_PAPERS_OVERLAP = 0.9
"""Overlap that co-evolving branches keep for the whole run in the paper's experiments."""

Curves = Mapping[str, Sequence[float]]


def write_report(run_dir: str | Path) -> tuple[str, Path]:
    """Writes ``report.png`` into a run directory; returns the behaviour lines and its path.

    Raises as ``read_run`` and ``save_plots``.
    """
    history = read_run(run_dir)
    return behaviour_lines(history), save_plots(history, Path(run_dir) / "report.png")


def save_plots(history: RunHistory, path: str | Path) -> Path:
    """Draws the picture, in the format of ``path``'s extension. Steps of Phase II are shaded.

    Raises ValueError (unknown format), OSError.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3)
    figure.suptitle(f"{figure_text(history.name)}: {len(history.steps)} steps, Phase II (OPD) shaded")
    rewards = history.named("", "/train/reward")
    _curves(axes[0, 0], history, "reward on the branch's own prompts", rewards)
    _between_zero_and_one(axes[0, 0], rewards)
    _overlap(axes[0, 1], history)
    _symmetric_kl(axes[0, 2], history)
    _bars(axes[1, 0], history)
    gap = history.named(TEACHER_GAP)
    _curves(axes[1, 1], history, "log p(teacher) - log p(student), student<-teacher", gap)
    _curves(axes[1, 2], history, "entropy (nats)", history.named("", "/train/entropy"))
    with replacing(path) as file:
        figure.savefig(file, dpi=110, format=Path(path).suffix[1:])
    return Path(path)


def _curves(panel: Any, history: RunHistory, title: str, curves: Curves) -> None:
    """One line per branch or edge, over the steps."""
    from matplotlib.ticker import MaxNLocator

    panel.set_title(figure_text(title), fontsize=10)
    panel.set_xlabel("step", fontsize=9)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    for span in phase_spans(history):
        panel.axvspan(span.first - 0.5, span.last + 0.5, color="0.92", lw=0, zorder=-1)
    marker = "." if len(history.steps) < 100 else ""
    for name, color in zip(sorted(curves), _cycle(len(curves)), strict=True):
        panel.plot(history.steps, curves[name], label=figure_text(name), lw=1.4, marker=marker, color=color)
    if curves:
        panel.set_xlim(history.steps[0] - 0.5, history.steps[-1] + 0.5)
        _legend_below(panel, min(3, len(curves)))
    else:
        panel.text(0.5, 0.5, "not measured", ha="center", transform=panel.transAxes, color="0.5")


def _overlap(panel: Any, history: RunHistory) -> None:
    """Top-k overlap on a scale where 1 is full agreement and half of it a large loss."""
    measured = history.named(OVERLAP)  # "10/text-image"
    top_k = next((name.partition("/")[0] for name in measured), None)
    curves = {history.edge(name.partition("/")[2]): values for name, values in measured.items()}
    title = "overlap" if top_k is None else f"overlap@{top_k}, student<-teacher"
    _curves(panel, history, title, curves)
    if curves:
        lowest = min(value for values in curves.values() for value in values if value == value)
        panel.set_ylim(0.0 if lowest < 0.5 else 0.5, 1.01)
        panel.axhline(_PAPERS_OVERLAP, color="0.6", lw=0.8, ls="--", zorder=0)


def _symmetric_kl(panel: Any, history: RunHistory) -> None:
    curves = {history.edge(pair): values for pair, values in history.named(SYMMETRIC_KL).items()}
    _curves(panel, history, "symmetric KL (nats), student<-teacher", curves)
    if any(value > 0 for values in curves.values() for value in values):
        panel.set_yscale("log", nonpositive="mask")


def _between_zero_and_one(panel: Any, curves: Curves) -> None:
    """The whole range of a verifier's score, unless values lie outside it (penalties, other rewards)."""
    values = [value for curve in curves.values() for value in curve if value == value]
    if values and min(values) >= 0.0 and max(values) <= 1.0:
        panel.set_ylim(-0.02, 1.02)


def _bars(panel: Any, history: RunHistory) -> None:
    """Validation accuracy: a group of bars for each domain and for their mean, a bar for each model."""
    panel.set_title("validation accuracy (%)", fontsize=10)
    if not history.accuracy:
        panel.text(0.5, 0.5, "no evaluation yet", ha="center", transform=panel.transAxes, color="0.5")
        return
    groups = [*history.domains, MEAN_COLUMN]
    width = 0.84 / len(history.accuracy)
    for index, (model, color) in enumerate(_colors_of_models(list(history.accuracy)).items()):
        row = history.accuracy[model]
        places = [group + (index + 0.5) * width - 0.42 for group in range(len(groups))]
        heights = [100 * (row.get(domain) or 0.0) for domain in groups]
        panel.bar(places, heights, width, label=figure_text(model), color=color)
        for place, height, domain in zip(places, heights, groups, strict=True):
            if row.get(domain) is not None:
                _value(panel, place, height)
    panel.set_xticks(range(len(groups)), [figure_text(group) for group in groups])
    panel.set_ylim(0, 100)
    _legend_below(panel, min(5, len(history.accuracy)))


def _value(panel: Any, place: float, height: float) -> None:
    """The figure at the top of a bar, inside it where there is room."""
    inside = height > 20
    panel.text(
        place,
        height - 1 if inside else height + 1,
        f"{height:.1f}",
        rotation=90,
        fontsize=7,
        ha="center",
        va="top" if inside else "bottom",
        color="white" if inside else "0.2",
    )


def _colors_of_models(models: Sequence[str]) -> dict[str, str]:
    """Base grey, merged dark, branches in the colours of their curves."""
    branches = sorted(set(models) - {"base", "merged"})
    colors = {"base": _BASE_COLOR, "merged": _MERGED_COLOR}
    colors |= dict(zip(branches, _cycle(len(branches)), strict=True))
    return {model: colors[model] for model in models}


def _cycle(count: int) -> list[str]:
    return [_COLORS[index % len(_COLORS)] for index in range(count)]


def _legend_below(panel: Any, columns: int) -> None:
    """Outside the axes, so that it hides no curve."""
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14)}
    panel.legend(fontsize=8, ncols=columns, frameon=False, handlelength=1.5, columnspacing=1.2, **place)
