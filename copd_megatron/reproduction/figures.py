"""The figures of the page, drawn from results.json alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from copd_megatron.reproduction.arms import COMPARISONS

_STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "copd", "font.size": 9, "axes.spines.top": False}
_STYLE |= {"axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3}
_SIZE = (6.4, 3.4)


def draw_all(results: Mapping[str, Any], folder: Path) -> list[str]:
    """Writes the figures for which there are figures; returns their file names."""
    two = results["comparisons"].get("two")
    if two is None:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, draw in {
        "arms": _arms,
        "likeness": _likeness,
        "ratio": _ratio,
        "strength": _strength,
        "distance": _distance,
        "lag": _lag,
    }.items():
        if _save(folder / f"{name}.svg", draw, two):
            drawn.append(f"{name}.svg")
    if _save(folder / "branches.svg", _branches, results["comparisons"]):
        drawn.append("branches.svg")
    return drawn


def _save(path: Path, draw: Any, data: Mapping[str, Any]) -> bool:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=_SIZE, layout="constrained")
        if not draw(figure.subplots(1, 2) if draw is _likeness else figure.subplots(), data):
            return False
        figure.savefig(path, metadata={"Date": None})
    text = path.read_text(encoding="utf-8")
    path.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n", encoding="utf-8")
    return True


def _error(figures: Sequence[Mapping[str, float]]) -> Any:
    """Distances from the values to the ends of their intervals, in percent, as matplotlib takes them."""
    return 100 * np.array(
        [[f["value"] - f["low"] for f in figures], [f["high"] - f["value"] for f in figures]]
    )


def _arms(axes: Any, two: Mapping[str, Any]) -> bool:
    """Table 1 as bars: mean over domains, greedy."""
    names = [arm.name for arm in COMPARISONS["two"] if two["models"].get(arm.name, {}).get("seeds")]
    figures = [two["models"][name]["greedy"]["mean"] for name in names]
    places = np.arange(len(names))[::-1]
    colors = ["#e0783a" if name == "copd" else "#3b82c4" for name in names]
    axes.barh(places, [100 * f["value"] for f in figures], xerr=_error(figures), color=colors, height=0.7)
    axes.set_yticks(places, [two["titles"][name] for name in names], fontsize=7)
    axes.set_xlabel("% right, mean of the domains, greedy")
    return bool(names)


def _likeness(axes: Any, two: Mapping[str, Any]) -> bool:
    """Fig. 4: overlap and symmetric KL by step, CoPD against independent training."""
    behaviour = two["behaviour"]
    drawn = False
    for panel, (key, label) in zip(
        axes, (("overlap", "top-3 overlap"), ("symmetric_kl", "symmetric KL, nats")), strict=True
    ):
        for name, color in (("independent", "#8a939b"), ("copd", "#e0783a"), ("copd_snapshot", "#3b82c4")):
            points: dict[int, list[float]] = {}
            for pair, seeds in behaviour.get(name, {}).get(key, {}).items():
                for values in seeds.values() if not pair.endswith("-start") else ():
                    for step, value in values:
                        points.setdefault(step, []).append(value)
            if points:
                steps = sorted(points)
                mean = np.array([np.mean(points[s]) for s in steps])
                spread = np.array([np.std(points[s]) for s in steps])
                panel.plot(steps, mean, color=color, label=name, lw=1.2)
                panel.fill_between(steps, mean - spread, mean + spread, color=color, alpha=0.15, lw=0)
                drawn = True
        for step in behaviour.get("copd", {}).get("opd_steps", ()):
            panel.axvspan(step - 0.5, step + 0.5, color="#000000", alpha=0.05, lw=0)
        if key == "overlap":
            panel.axhline(0.9, color="#000000", lw=0.8, ls="--")
        panel.set_xlabel("step (shaded: Phase II)")
        panel.set_title(label, fontsize=9)
        panel.legend(fontsize=7)
    return drawn


def _points(axes: Any, two: Mapping[str, Any], places: Mapping[str, float], label: str) -> bool:
    found = {name: x for name, x in places.items() if name in two["models"]}
    if len(found) < 2:
        return False
    names = sorted(found, key=lambda name: found[name])
    figures = [two["models"][name]["greedy"]["mean"] for name in names]
    values = [100 * f["value"] for f in figures]
    axes.errorbar(
        [found[n] for n in names], values, yerr=_error(figures), marker="o", capsize=3, lw=1, label=label
    )
    axes.set_ylabel("% right, mean of the domains")
    return True


def _ratio(axes: Any, two: Mapping[str, Any]) -> bool:
    places = {"copd_ratio_0_5": 0.5, "copd_ratio_1": 1, "copd": 1.5, "copd_ratio_2": 2, "copd_ratio_3": 3}
    axes.set_xlabel("S_RL : S_OPD")
    return _points(axes, two, places, "CoPD")


def _strength(axes: Any, two: Mapping[str, Any]) -> bool:
    drawn = [
        _points(axes, two, places, label)
        for label, places in (
            ("no clip", {"copd_beta_0_3": 0.3, "copd": 1.0, "copd_beta_3": 3.0}),
            ("clip 1 nat", {"copd_beta_0_3_clip": 0.3, "copd_beta_1_clip": 1.0, "copd_beta_3_clip": 3.0}),
        )
    ]
    axes.set_xscale("log")
    axes.set_xlabel("beta")
    if any(drawn):
        axes.legend(fontsize=7)
    return any(drawn)


def _lag(axes: Any, two: Mapping[str, Any]) -> bool:
    axes.set_xlabel("largest lag of a teacher, steps")
    return _points(axes, two, {"copd": 0, "copd_every_4": 3, "copd_snapshot": 9}, "CoPD")


def _distance(axes: Any, two: Mapping[str, Any]) -> bool:
    """Fig. 2: gain of students at controlled distance, with a straight line's fit."""
    points = two["distance"]
    if len(points) < 3:
        return False
    x = np.array([p["overlap"] for p in points])
    y = 100 * np.array([p["gain"] for p in points])
    axes.scatter(x, y, c=[p["age"] for p in points], cmap="viridis", s=22)
    if x.std():
        slope, intercept = np.polyfit(x, y, 1)
        ends = np.array([x.min(), x.max()])
        axes.plot(ends, slope * ends + intercept, color="#000000", lw=0.9)
        axes.set_title(f"r = {np.corrcoef(x, y)[0, 1]:.2f}, {len(points)} points", fontsize=9)
    axes.set_xlabel("top-3 overlap with the teacher before")
    axes.set_ylabel("gain on the teacher's domain, points")
    return True


def _branches(axes: Any, comparisons: Mapping[str, Any]) -> bool:
    """K = 2, 3, 4: CoPD and the mean of experts."""
    drawn = False
    for label in ("copd", "experts_mean", "mixed_wider"):
        rows = [
            (k, comparisons[name]["models"][label]["greedy"]["mean"])
            for k, name in ((2, "two"), (3, "three"), (4, "four"))
            if label in comparisons.get(name, {}).get("models", {})
        ]
        if len(rows) > 1:
            figures = [figure for _, figure in rows]
            axes.errorbar(
                [k for k, _ in rows],
                [100 * f["value"] for f in figures],
                yerr=_error(figures),
                marker="o",
                capsize=3,
                lw=1,
                label=label,
            )
            drawn = True
    axes.set_xticks([2, 3, 4])
    axes.set_ylim(0, 100)  # Student's t knows no bounds
    axes.set_xlabel("branches")
    axes.set_ylabel("% right, mean of the domains")
    if drawn:
        axes.legend(fontsize=7)
    return drawn
