"""Panels as SVG that takes its colours from the page around it, so that it suits light and dark alike."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Final

from copd_megatron.config.domains import MEAN_COLUMN
from copd_megatron.report.names import figure_text
from copd_megatron.report.panels import Curve, Panel, PhaseSpan, smoothed
from copd_megatron.report.scores import ScoreTable

PALETTE: Final = (
    "#3b82c4",
    "#e0783a",
    "#3c9e62",
    "#b5589f",
    "#8371cf",
    "#a5902a",
    "#3aa3a8",
    "#c4515f",
    "#5f8f2e",
)
_INK, _GRID, _SHADE = "#010203", "#040506", "#070809"
_FIXED: Final = {"base": "#8a939b", "merged": _INK}
_PANEL_SIZE, _SCORES_SIZE = (4.6, 3.0), (6.4, 3.5)
"""Inches, near the size at which the page shows them: a larger drawing's letters would be too small there."""
_LEGEND_CHARACTERS = 9.5
"""Characters of a legend's line for each inch, marks and gaps aside."""
_LEGEND_LINE = 0.18
"""Inches."""
_LEAST_TOP = 0.05
"""Upper end of an axis from 0 along which all values are 0."""
_GAP = 3
"""A line breaks where values are missing for more than so many times their usual distance."""
"""Stand for the page's colours while matplotlib draws."""
_THEME = {_INK: "currentColor", _GRID: "var(--grid)", _SHADE: "var(--shade)"}
_SIZE = re.compile(r'(<svg\b[^>]*?) width="[^"]*"', re.DOTALL)
_HEIGHT = re.compile(r'(<svg\b[^>]*?) height="[^"]*"', re.DOTALL)
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
}


def draw_panel(panel: Panel, spans: Sequence[PhaseSpan], colors: dict[str, str]) -> str:
    """The panel as an SVG element.

    Args:
        spans: steps to shade.
        colors: label of a curve to its colour; labels without one get the next of the palette.
    """

    def paint(axes: Any) -> None:
        for span in spans:
            axes.axvspan(span.first - 0.5, span.last + 0.5, color=_SHADE, lw=0, zorder=0)
        (_stack if panel.stacked else _lines)(axes, panel, colors)
        if panel.reference is not None:
            axes.axhline(panel.reference, color=_INK, lw=0.8, ls="--", alpha=0.6, zorder=1)
        if panel.log and _positive(panel.curves):
            axes.set_yscale("log", nonpositive="mask")
        if panel.limits is not None:
            axes.set_ylim(*panel.limits)
        elif panel.from_zero:
            axes.set_ylim(0, max(1.08 * _highest(panel.curves), _LEAST_TOP))
        _steps(axes, panel.curves)

    return _svg(paint, _PANEL_SIZE, panel.title)


def draw_scores(table: ScoreTable, colors: dict[str, str]) -> str:
    """Accuracies as points with their intervals: a group for each domain, a point for each model."""
    groups = [*table.domains, MEAN_COLUMN]

    def paint(axes: Any) -> None:
        for index, model in enumerate(table.models):
            shift = (index - (len(table.models) - 1) / 2) * 0.7 / max(1, len(table.models))
            found = [(place, table.cell(model, domain)) for place, domain in enumerate(groups)]
            points = [(place + shift, cell) for place, cell in found if cell is not None]
            if not points:
                continue
            axes.errorbar(
                [place for place, _ in points],
                [100 * cell.value for _, cell in points],
                yerr=[
                    [100 * (cell.value - cell.low) for _, cell in points],
                    [100 * (cell.high - cell.value) for _, cell in points],
                ],
                fmt="o",
                ms=5,
                capsize=3,
                lw=1.2,
                color=color_of(model, colors),
                label=figure_text(model),
            )
        axes.set_xticks(range(len(groups)), [figure_text(group) for group in groups])
        axes.set_xlim(-0.6, len(groups) - 0.4)
        axes.set_yticks(range(0, 101, 20))
        axes.set_ylim(-3, 103)  # a point at 0 or 100 is seen whole
        axes.set_ylabel("accuracy (%)")
        axes.grid(False, axis="x")

    return _svg(paint, _SCORES_SIZE, "accuracy")


def color_of(label: str, colors: dict[str, str]) -> str:
    """The label's colour, which it keeps on the whole page."""
    if label in _FIXED:
        return _FIXED[label]
    return colors.setdefault(label, PALETTE[len(colors) % len(PALETTE)])


def _lines(axes: Any, panel: Panel, colors: dict[str, str]) -> None:
    for curve in panel.curves:
        color = color_of(curve.label, colors)
        places, values = _known(curve)
        marker = "o" if len(places) <= 30 else ""
        smooth = smoothed(values)
        if smooth != tuple(values):
            axes.plot(places, values, color=color, lw=0.7, alpha=0.35)
        axes.plot(places, smooth, color=color, lw=1.6, marker=marker, ms=3, label=figure_text(curve.label))
        if curve.low is not None and curve.high is not None:
            low, high = (_known(curve, edge)[1] for edge in (curve.low, curve.high))
            axes.fill_between(places, low, high, color=color, alpha=0.18, lw=0)


def _known(curve: Curve, edge: Sequence[float] | None = None) -> tuple[list[float], list[float]]:
    """Points that exist, of the curve or of an edge of its band. A line connects them over steps without a
    value, but not over a whole phase without any: there a NaN stands between them."""
    there = [i for i, value in enumerate(curve.values) if not math.isnan(value)]
    steps = [curve.steps[i] for i in there]
    usual = min((b - a for a, b in pairwise(steps)), default=1)
    places, values = list[float](), list[float]()
    for i in there:
        if places and curve.steps[i] - places[-1] > _GAP * usual:
            places.append((places[-1] + curve.steps[i]) / 2)
            values.append(math.nan)
        places.append(curve.steps[i])
        values.append((curve.values if edge is None else edge)[i])
    return places, values


def _stack(axes: Any, panel: Panel, colors: dict[str, str]) -> None:
    edges = [place - 0.5 for place in panel.curves[0].steps]
    edges.append(edges[-1] + 1)
    floor = [0.0] * len(panel.curves[0].steps)
    for curve in panel.curves:
        top = [f + v for f, v in zip(floor, curve.values, strict=True)]
        color = color_of(curve.label, colors)
        axes.stairs(top, edges, baseline=floor, fill=True, color=color, label=figure_text(curve.label), lw=0)
        floor = top


def _steps(axes: Any, curves: Sequence[Curve]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step")
    axes.set_xlim(curves[0].steps[0] - 0.5, curves[0].steps[-1] + 0.5)


def _positive(curves: Sequence[Curve]) -> bool:
    return any(value > 0 for curve in curves for value in curve.values)


def _highest(curves: Sequence[Curve]) -> float:
    """The highest value of a line or its band; 0 without any."""
    values = [v for curve in curves for v in (*curve.values, *(curve.high or ()))]
    return max((v for v in values if not math.isnan(v)), default=0.0)


def _svg(paint: Any, size: tuple[float, float], name: str) -> str:
    """What ``paint`` draws on axes, as an SVG without a fixed size. ``name`` keeps the identifiers inside
    apart from those of the page's other figures."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        figure.patch.set_alpha(0)
        axes.patch.set_alpha(0)
        axes.set_axisbelow(True)
        paint(axes)
        if labels := axes.get_legend_handles_labels()[1]:
            columns = max(1, min(4, int(_LEGEND_CHARACTERS * size[0]) // (max(map(len, labels)) + 4)))
            lines = math.ceil(len(labels) / columns)
            figure.set_size_inches(
                size[0], size[1] + (lines - 1) * _LEGEND_LINE
            )  # the axes keep their height
            figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for stand_in, color in _THEME.items():
        text = text.replace(stand_in, color)
    return _HEIGHT.sub(r"\1", _SIZE.sub(r"\1", text, count=1), count=1)
