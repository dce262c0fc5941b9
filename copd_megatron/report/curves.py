"""What a run did, from its files: how alike the branches stayed, in text, and its curves as a picture.

Reads ``metrics.jsonl`` and ``evaluation.json`` of a run directory. ``copd report`` is the command; a run
ends with it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OVERLAP = "copd/overlap@"
SYMMETRIC_KL = "copd/sym_kl/"
TEACHER_GAP = "copd/teacher_gap/"
_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 40


@dataclass(frozen=True, kw_only=True)
class RunHistory:
    """A run's metrics, one entry a step, and its table."""

    name: str
    steps: tuple[int, ...]
    phases: tuple[str, ...]
    """``rlvr`` or ``opd``, per step."""
    series: Mapping[str, tuple[float, ...]]
    """Metric name to its values, NaN at steps that have none."""
    accuracy: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    """Model to domain to accuracy; empty before the run's end."""
    domains: tuple[str, ...] = ()

    def named(self, prefix: str, suffix: str = "") -> dict[str, tuple[float, ...]]:
        """Series whose name starts and ends so, under what is between."""
        return {
            name[len(prefix) : len(name) - len(suffix)]: values
            for name, values in self.series.items()
            if name.startswith(prefix) and name.endswith(suffix)
        }


def read_run(run_dir: str | Path) -> RunHistory:
    """The history of a run directory.

    A step that is there twice, because a run was taken up again behind it, counts as written last.

    Raises:
        FileNotFoundError: no ``metrics.jsonl``.
        ValueError: a line of it is not a step's metrics.
    """
    folder = Path(run_dir)
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a run directory with at least one step is needed")
    rows: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            rows[int(row["step"])] = row
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not the metrics of a step ({error!r})") from error
    steps = sorted(rows)
    names = dict.fromkeys(
        name for step in steps for name, value in rows[step].items() if _is_number(value) and name != "step"
    )
    series = {name: tuple(_number(rows[step].get(name)) for step in steps) for name in names}
    table = folder / "evaluation.json"
    evaluation = json.loads(table.read_text(encoding="utf-8")) if table.is_file() else {}
    return RunHistory(
        name=folder.resolve().name,
        steps=tuple(steps),
        phases=tuple(str(rows[step].get("phase", "")) for step in steps),
        series=series,
        accuracy=evaluation.get("accuracy", {}),
        domains=tuple(evaluation.get("domains", ())),
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


# ---- text -----------------------------------------------------------------------------------------------


def behaviour_lines(history: RunHistory) -> str:
    """One line for each student-teacher pair and measure: at first, at last, and the way between.

    First and last are means over a tenth of the measurements. Empty if the run measured none.
    """
    lines = [["student-teacher", "measure", "first", "last", "over the run"]]
    for name, values in sorted(history.series.items()):
        if name.startswith(OVERLAP):
            measure, _, pair = name.removeprefix("copd/").partition("/")
        elif name.startswith(SYMMETRIC_KL):
            measure, pair = "symmetric KL", name.removeprefix(SYMMETRIC_KL)
        else:
            continue
        known = [value for value in values if not math.isnan(value)]
        few = max(1, len(known) // 10)
        first, last = math.fsum(known[:few]) / few, math.fsum(known[-few:]) / few
        lines.append([pair, measure, f"{first:.3f}", f"{last:.3f}", sparkline(known)])
    if len(lines) == 1:
        return ""
    lines[1:] = sorted(lines[1:])
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
    """Values as bars between their least and greatest, neighbours averaged to at most 40."""
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


# ---- picture --------------------------------------------------------------------------------------------


def save_plots(history: RunHistory, path: str | Path) -> Path:
    """Curves and accuracies as one picture, in the format of ``path``'s extension.

    Phase II is shaded. Raises ValueError (unknown format), OSError.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3)
    figure.suptitle(f"{history.name}: {len(history.steps)} steps, Phase II (OPD) shaded")
    top_k = next((name.split("/")[1] for name in history.series if name.startswith(OVERLAP)), "overlap")
    for panel, title, curves in (
        (axes[0, 0], "reward on own prompts (sampled)", history.named("", "/train/reward")),
        (axes[0, 1], f"{top_k}, student-teacher", history.named(f"copd/{top_k}/")),
        (axes[0, 2], "symmetric KL, student-teacher (nats)", history.named(SYMMETRIC_KL)),
        (axes[1, 1], "teacher - student log-probability on cross rows", history.named(TEACHER_GAP)),
        (axes[1, 2], "entropy (nats)", history.named("", "/train/entropy")),
    ):
        _curves(panel, history, title, curves)
    if any(value > 0 for values in history.named(SYMMETRIC_KL).values() for value in values):
        axes[0, 2].set_yscale("log", nonpositive="mask")
    _bars(axes[1, 0], history)
    figure.savefig(path, dpi=110)
    return Path(path)


def _curves(panel: Any, history: RunHistory, title: str, curves: Mapping[str, Sequence[float]]) -> None:
    panel.set_title(title, fontsize=10)
    panel.set_xlabel("step", fontsize=9)
    for step, phase in zip(history.steps, history.phases, strict=True):
        if phase == "opd":
            panel.axvspan(step - 0.5, step + 0.5, color="0.92", lw=0)
    for name, values in curves.items():
        panel.plot(history.steps, values, label=name, lw=1.4, marker="." if len(values) < 100 else "")
    if curves:
        panel.legend(fontsize=8)
    else:
        panel.text(0.5, 0.5, "not measured", ha="center", transform=panel.transAxes, color="0.5")


def _bars(panel: Any, history: RunHistory) -> None:
    """Validation accuracy, a group of bars for each domain, a bar for each model."""
    panel.set_title("validation accuracy", fontsize=10)
    if not history.accuracy:
        panel.text(0.5, 0.5, "no evaluation yet", ha="center", transform=panel.transAxes, color="0.5")
        return
    groups = [*history.domains, "mean"]
    width = 0.8 / len(history.accuracy)
    for index, (model, row) in enumerate(history.accuracy.items()):
        places = [group + (index + 0.5) * width - 0.4 for group in range(len(groups))]
        heights = [100 * (row.get(domain) or 0.0) for domain in groups]
        panel.bar(places, heights, width, label=model)
    panel.set_xticks(range(len(groups)), groups)
    panel.set_ylabel("%", fontsize=9)
    panel.set_ylim(0, 125)  # room for the legend
    panel.legend(fontsize=8, ncols=min(3, len(history.accuracy)), loc="upper center")


def write_report(run_dir: str | Path) -> tuple[str, Path]:
    """Writes ``report.png`` into a run directory; returns the behaviour lines and its path.

    Raises as ``read_run`` and ``save_plots``.
    """
    history = read_run(run_dir)
    return behaviour_lines(history), save_plots(history, Path(run_dir) / "report.png")
