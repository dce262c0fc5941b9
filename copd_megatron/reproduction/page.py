"""The page: what was asked, how, what was found, written from results.json."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from copd_megatron.reproduction.arms import COMPARISONS
from copd_megatron.reproduction.claims import FAILS, HOLDS, OPEN
from copd_megatron.reproduction.setting import SETTINGS

_TABLES = {
    "two": "Two branches (the paper's Tables 1 and 3)",
    "three": "Three branches (the paper's Table 2)",
    "four": "Four branches",
}
_READING = (
    "Percent of held-out prompts answered rightly, greedily unless it says sampled, with 95 % intervals. "
    "Seeds differ far more than arms do, and not all arms have all seeds. So arms are compared by the "
    "column of differences, seed by seed and prompt by prompt."
)
_BY_SEED = "Seed by seed, mean of the domains, greedy:"
_CAPTIONS = {
    "arms.svg": "Two branches: all arms, mean of the domains, greedy, with 95 % intervals.",
    "likeness.svg": "Overlap and symmetric KL between the branches by step (the paper's Fig. 4). Lines: mean "
    "over seeds; bands: one standard deviation.",
    "ratio.svg": "Length of the phases (the paper's Fig. 4).",
    "strength.svg": "Weight of distillation, with and without a clip of the log-ratio (not in the paper).",
    "lag.svg": "Lag of the teachers (not in the paper).",
    "distance.svg": "Gain of a student at controlled distance from a frozen teacher, against their overlap "
    "before (the paper's Fig. 2). Colour: how many steps the student had learned apart.",
    "branches.svg": "Two, three and four branches.",
}


def page(results: Mapping[str, Any], introduction: str, figures: Sequence[str], *, findings: str = "") -> str:
    """The page as Markdown.

    Args:
        results: as ``tools/reproduce.py page`` writes them.
        introduction: what stands before the results.
        figures: file names in ``figures/``.
        findings: what its authors make of these results, in words.
    """
    parts = [introduction.rstrip(), "## The choice of the setting", _selection(results["selection"])]
    if results.get("criteria"):
        parts += ["The same criteria on the seeds of the comparison:", _criteria(results["criteria"])]
    if not results["comparisons"]:
        parts.append("No arm has been measured yet.")
    claimed = {name: found for name, found in results["comparisons"].items() if found["claims"]}
    if claimed:
        parts.append("## What holds")
        if findings:
            parts.append(findings.strip())
    for name in _TABLES:
        if name in claimed:
            parts += [f"### {_TABLES[name]}", _in_short(claimed[name]), _claims(claimed[name])]
    for name, title in _TABLES.items():
        if name in results["comparisons"]:
            found = results["comparisons"][name]
            tables = [_READING, _table(name, found), _BY_SEED, _by_seed(name, found)]
            parts += [f"## {title}", *tables, _branches(name, found)]
    if figures:
        parts += [
            "## Figures",
            *(f"![{_CAPTIONS[name]}](figures/{name})\n\n{_CAPTIONS[name]}" for name in figures),
        ]
    parts += ["## Cost", _cost(results)]
    return "\n\n".join(parts) + "\n"


def _selection(selection: Mapping[str, Any]) -> str:
    lines = ["All settings that were tried, in their order, on the tuning seeds:"]
    for setting in SETTINGS.values():
        if setting.given_up:
            lines += ["", f"**{setting.name}**: {setting.why}. Given up: {setting.given_up}."]
    for name in (name for name in SETTINGS if name in selection):
        found = selection[name]
        seeds = ", ".join(map(str, found["seeds"]))
        lines += [
            "",
            f"**{name}** (seeds {seeds}): {found['why']}.",
            "",
            _criteria(found["criteria"]),
        ]
    return "\n".join(lines)


def _criteria(found: Sequence[Mapping[str, Any]]) -> str:
    rows = [f"| {c['text']} | {c['figures']} | {_met(c)} |" for c in found]
    return "\n".join(["| criterion | found | met |", "|---|---|---|", *rows])


def _met(criterion: Mapping[str, Any]) -> str:
    if criterion["met"]:
        return "yes"
    return "no" if criterion["required"] else "no (no condition)"


def _in_short(comparison: Mapping[str, Any]) -> str:
    """How many claims came out which way, and which."""
    lines = []
    for verdict in (HOLDS, FAILS, OPEN):
        texts = [c["claim"]["text"] for c in comparison["claims"] if c["verdict"] == verdict]
        if texts:
            lines.append(f"- **{verdict}** ({len(texts)}): {'; '.join(texts)}")
    return "\n".join(lines)


def _claims(comparison: Mapping[str, Any]) -> str:
    rows = []
    for entry in comparison["claims"]:
        claim, figure = entry["claim"], entry["figure"]
        rows.append(
            f"| {claim['text']} | {claim['source']} | {_figure(claim, figure)} | **{entry['verdict']}** |"
        )
    return "\n".join(["| claim | whose | measured | verdict |", "|---|---|---|---|", *rows])


def _figure(claim: Mapping[str, Any], figure: Mapping[str, float]) -> str:
    if " - " in claim["figure"]:
        return f"{_points(figure)} points"
    if not math.isfinite(figure["low"]):
        return f"{figure['value']:.2f}"
    return f"{figure['value']:.2f} ({figure['low']:.2f} to {figure['high']:.2f})"


def _table(name: str, comparison: Mapping[str, Any]) -> str:
    domains = [*comparison["domains"], "mean"]
    spent = ["steps", "thousand tokens", "core-minutes"]
    head = ["arm", "seeds", *domains, "mean, sampled", "mean against CoPD, same seeds", *spent]
    rows = [
        _row(comparison, arm.name, comparison["titles"][arm.name], domains)
        for arm in COMPARISONS[name]
        if arm.name in comparison["models"]
    ]
    return _lines(head, rows)


def _branches(name: str, comparison: Mapping[str, Any]) -> str:
    """The models that arms end with before they are merged, folded away."""
    shown = {arm.name for arm in COMPARISONS[name]}
    labels = [
        label for label in comparison["models"] if label not in shown and not label.startswith("distance")
    ]
    domains = [*comparison["domains"], "mean"]
    head = ["model", "seeds", *domains, "mean, sampled", "mean against CoPD, same seeds"]
    rows = [_row(comparison, label, label, domains)[: len(head)] for label in labels]
    summary = "<summary>Experts, and branches before their merge</summary>"
    return f"<details>{summary}\n\n{_lines(head, rows)}\n\n</details>"


def _lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return "\n".join([cells[0], "|---" * len(head) + "|", *cells[1:]])


def _by_seed(name: str, comparison: Mapping[str, Any]) -> str:
    arms = [arm for arm in COMPARISONS[name] if arm.name in comparison["models"]]
    seeds = sorted({seed for arm in arms for seed in comparison["models"][arm.name]["seeds"]})
    rows = []
    for arm in arms:
        per = comparison["models"][arm.name]["per_seed"]
        cells = [f"{100 * per[str(s)]['mean']:.1f}" if str(s) in per else "" for s in seeds]
        rows.append(f"| {comparison['titles'][arm.name]} | " + " | ".join(cells) + " |")
    head = "| arm | " + " | ".join(f"seed {seed}" for seed in seeds) + " |"
    return "\n".join([head, "|---" * (len(seeds) + 1) + "|", *rows])


def _row(comparison: Mapping[str, Any], label: str, title: str, domains: Sequence[str]) -> list[str]:
    model = comparison["models"][label]
    budget = comparison["budgets"].get(label)
    spent = (
        [f"{budget['steps']:.0f}", f"{budget['tokens'] / 1000:.0f}", f"{budget['core_seconds'] / 60:.1f}"]
        if budget
        else ["", "", ""]
    )
    sampled = _percent(model["sampled"]["mean"]) if model["sampled"] else "-"
    against = model["against_copd"]
    figures = [_percent(model["greedy"][d]) for d in domains]
    return [
        title,
        str(len(model["seeds"])),
        *figures,
        sampled,
        "" if against is None else _points(against),
        *spent,
    ]


def _percent(figure: Mapping[str, float]) -> str:
    """A share of right answers. Student's t knows no bounds, so an interval may pass 0 and 100: cut there."""
    if not math.isfinite(figure["low"]):
        return f"{100 * figure['value']:.1f}"
    low, high = max(0.0, figure["low"]), min(1.0, figure["high"])
    return f"{100 * figure['value']:.1f} ({100 * low:.0f} to {100 * high:.0f})"


def _points(figure: Mapping[str, float]) -> str:
    if not math.isfinite(figure["low"]):
        return f"{100 * figure['value']:+.1f}"
    return f"{100 * figure['value']:+.1f} ({100 * figure['low']:+.1f} to {100 * figure['high']:+.1f})"


def _cost(results: Mapping[str, Any]) -> str:
    found = results["comparisons"]
    hours = {name: found[name]["core_seconds"] / 3600 for name in _TABLES if name in found}
    each = ", ".join(f"{spent:.1f} with {name} branches" for name, spent in hours.items())
    return (
        f"Training and measuring took {sum(hours.values()):.1f} core-hours on {results['machine']}: {each}. "
        "Every run's configuration, log, metrics and samples are in the folder of its seed, "
        "`runs/reproduction/<setting>/seed_<n>/<comparison>/<task>`. `python tools/reproduce.py show ARM "
        "--seeds N` prints an arm's configurations without running anything."
    )
