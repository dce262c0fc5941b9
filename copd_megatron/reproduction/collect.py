"""All that was measured of a comparison, as one JSON object from which page and figures are drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from copd_megatron.evaluation.statistics import Estimate
from copd_megatron.recipes.experiments.base import Task
from copd_megatron.report.history import OVERLAP, SYMMETRIC_KL, RunHistory, read_run
from copd_megatron.reproduction.arms import COMPARISONS, INDEPENDENT, Arm
from copd_megatron.reproduction.budget import budget_of
from copd_megatron.reproduction.claims import CLAIMS, verdicts
from copd_megatron.reproduction.compare import MODES, SeedFolder
from copd_megatron.reproduction.runner import Cost, job_of
from copd_megatron.reproduction.scores import (
    MEAN,
    DomainValues,
    difference,
    estimate,
    macro,
    over_seeds,
    read_scores,
)
from copd_megatron.untrusted.json_text import load_file

LEAST_SEEDS = 3
"""Fewer decide no claim."""
Scores = dict[str, dict[int, DomainValues]]
"""Label of a model to seed to its rewards."""


def collect(comparison: str, folders: Sequence[SeedFolder]) -> dict[str, Any]:
    """What was measured so far; arms and seeds that were not are left out."""
    scores = {mode: _scores(comparison, folders, mode) for mode in MODES}
    domains = list(folders[0].config(comparison).branches)
    titles = {arm.name: arm.title for arm in COMPARISONS[comparison]}
    greedy = scores["greedy"]
    found: dict[str, Any] = {
        "domains": domains,
        "titles": titles,
        "models": {
            label: {
                "seeds": sorted(seeds),
                **{mode: _figures(scores[mode].get(label, {}), domains) for mode in MODES},
                "against_copd": _against(greedy, label),
                "per_seed": {
                    str(s): {d: macro(v, d) for d in [*domains, MEAN]} for s, v in sorted(seeds.items())
                },
            }
            for label, seeds in greedy.items()
        },
        "budgets": _budgets(comparison, folders, titles),
        "behaviour": _behaviour(comparison, folders),
        "distance": _distance(folders, greedy) if comparison == "two" else [],
        "core_seconds": _core_seconds(comparison, folders),
    }
    figures = _claimed(comparison, greedy, domains, found)
    found["claims"] = [
        {"claim": asdict(claim), "figure": asdict(figure), "verdict": verdict}
        for claim, figure, verdict in verdicts(figures)
    ]
    return found


def _scores(comparison: str, folders: Sequence[SeedFolder], mode: str) -> Scores:
    found: Scores = {}
    for folder in folders:
        for path in sorted(folder.scores(comparison, mode).glob("*.json")):
            found.setdefault(path.stem, {})[folder.seed] = read_scores(path.parent, path.stem)
    return found


def _figures(seeds: Mapping[int, DomainValues], domains: Sequence[str]) -> dict[str, Any]:
    values = [seeds[seed] for seed in sorted(seeds)]
    return {domain: asdict(estimate(values, domain)) for domain in [*domains, MEAN]} if values else {}


def _against(scores: Scores, label: str) -> dict[str, float] | None:
    """How much a model solves more than CoPD's, mean of the domains, on the seeds that both have."""
    copd = scores.get("copd", {})
    if label == "copd" or not set(copd) & set(scores[label]):
        return None
    return asdict(difference(scores[label], copd))


def _budgets(comparison: str, folders: Sequence[SeedFolder], names: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, list[dict[str, float]]] = {}
    for folder in folders:
        for arm in COMPARISONS[comparison]:
            tasks = folder.made(comparison, arm).tasks
            costs = _costs(folder, comparison, tasks)
            if tasks and costs is not None:
                budget = budget_of(tasks, folder.runs(comparison), costs)
                found.setdefault(arm.name, []).append(asdict(budget))
    return {
        name: {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
        for name, rows in found.items()
    }


def _costs(folder: SeedFolder, comparison: str, tasks: Sequence[Task]) -> dict[str, Cost] | None:
    """What the tasks took, and the independent experts; None if one is not done."""
    jobs = folder.runs(comparison) / "jobs"
    costs = {}
    for task in tasks:
        cost = job_of(task, jobs).cost()
        if cost is None:
            return None
        costs[task.name] = cost
    if INDEPENDENT not in costs:
        experts = next(arm for arm in COMPARISONS[comparison] if arm.name == "experts_mean")
        task = folder.made(comparison, experts).tasks[0]
        cost = job_of(task, jobs).cost()
        if cost is None:
            return None
        costs[INDEPENDENT] = cost
    return costs


def _core_seconds(comparison: str, folders: Sequence[SeedFolder]) -> float:
    """Of all training and measuring; without the bases, which serve other comparisons, too."""
    places = [path for folder in folders for path in (folder.runs(comparison) / "jobs").glob("*.json")]
    return math.fsum(float(load_file(path)["core_seconds"]) for path in places)


def _behaviour(comparison: str, folders: Sequence[SeedFolder]) -> dict[str, Any]:
    """Overlap and symmetric KL of every pair by step: mean over seeds, and each seed's least and last."""
    found: dict[str, Any] = {}
    arms: list[Arm] = list(COMPARISONS[comparison])
    names = {INDEPENDENT, *(arm.name for arm in arms if arm.name.startswith(("copd", "opcod")))}
    for name in sorted(names):
        histories = {
            folder.seed: read_run(folder.runs(comparison) / name)
            for folder in folders
            if (folder.runs(comparison) / "jobs" / f"{name}.json").is_file()
        }
        if histories:
            found[name] = {
                "overlap": _curves(histories, OVERLAP),
                "symmetric_kl": _curves(histories, SYMMETRIC_KL),
                "opd_steps": _opd_steps(next(iter(histories.values()))),
            }
    return found


def _opd_steps(history: RunHistory) -> list[int]:
    return [step for step, phase in zip(history.steps, history.phases, strict=True) if phase == "opd"]


def _curves(histories: Mapping[int, RunHistory], prefix: str) -> dict[str, Any]:
    """Pair of branches to seed to its (step, value) points."""
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for seed, history in histories.items():
        for name, values in history.named(prefix).items():
            pair = name.rpartition("/")[2]
            points = [(s, v) for s, v in zip(history.steps, values, strict=True) if not math.isnan(v)]
            curves.setdefault(pair, {})[str(seed)] = points
    return curves


def _distance(folders: Sequence[SeedFolder], scores: Scores) -> list[dict[str, float]]:
    """One point for each seed and age of the student: overlap at the start, gain on the teacher's domain."""
    points = []
    for folder in folders:
        first, second = folder.config("two").branches
        for label, seeds in scores.items():
            age = label.removeprefix("distance.after.")
            before = scores.get(f"distance.before.{age}", {})
            if label == age or folder.seed not in seeds or folder.seed not in before:
                continue
            history = read_run(folder.runs("two") / f"distance_{age}")
            overlaps = [
                next(v for v in values if not math.isnan(v))
                for name, values in history.named(OVERLAP).items()
                if name.endswith(f"{first}-{second}")
            ]
            gain = macro(seeds[folder.seed], second) - macro(before[folder.seed], second)
            points.append({"seed": folder.seed, "age": int(age), "overlap": overlaps[0], "gain": gain})
    return points


def _claimed(
    comparison: str, scores: Scores, domains: Sequence[str], found: Mapping[str, Any]
) -> dict[str, Estimate]:
    """The figures that decide the claims, as far as they were measured."""
    figures: dict[str, Estimate] = {}
    for claim in CLAIMS:
        ours, _, theirs = claim.figure.partition(" - ")
        if ours in scores and theirs in scores and set(scores[ours]) & set(scores[theirs]):
            figures[claim.figure] = _told(scores[ours], scores[theirs])
    copd = scores.get("copd", {})
    home = _at_home(scores, domains)
    if copd and home:
        figures["copd - experts at home"] = _told(copd, home)
    branches = _mean_of([scores.get(f"copd.{d}", {}) for d in domains])
    if copd and branches:
        figures["copd - branches of copd"] = _told(copd, branches)
    figures |= _behaviour_figures(found["behaviour"])
    if len(points := found["distance"]) > 2:
        figures["r of gain and overlap"] = _correlation(points)
    return figures


def _told(ours: Mapping[int, DomainValues], theirs: Mapping[int, DomainValues]) -> Estimate:
    """The difference, as far as claims may be decided by it."""
    return _decided(difference(ours, theirs), len(set(ours) & set(theirs)))


def _decided(found: Estimate, num_seeds: int) -> Estimate:
    """The figure, which of too few seeds could be anything."""
    if num_seeds >= LEAST_SEEDS:
        return found
    return Estimate(value=found.value, low=-math.inf, high=math.inf)


def _at_home(scores: Scores, domains: Sequence[str]) -> dict[int, DomainValues]:
    """Per seed, every domain as its own expert solves it."""
    experts = {d: scores.get(f"expert.{d}", {}) for d in domains}
    seeds = set.intersection(*(set(found) for found in experts.values()))
    return {seed: {d: experts[d][seed][d] for d in domains} for seed in sorted(seeds)}


def _mean_of(models: Sequence[Mapping[int, DomainValues]]) -> dict[int, DomainValues]:
    """Per seed, the mean of several models' rewards."""
    seeds = set.intersection(*(set(found) for found in models))
    return {
        seed: {d: np.mean([model[seed][d] for model in models], axis=0) for d in models[0][seed]}
        for seed in sorted(seeds)
    }


def _behaviour_figures(behaviour: Mapping[str, Any]) -> dict[str, Estimate]:
    if "copd" not in behaviour:
        return {}
    least = _per_seed(behaviour["copd"]["overlap"], lambda values: min(values))
    figures = {"least overlap of copd": _decided(over_seeds(list(least.values())), len(least))}
    if INDEPENDENT in behaviour:
        ours = _per_seed(behaviour["copd"]["symmetric_kl"], lambda values: values[-1])
        theirs = _per_seed(behaviour[INDEPENDENT]["symmetric_kl"], lambda values: values[-1])
        # branches that never learned are no measure of how far learning drives them apart
        apart = sorted(seed for seed in set(ours) & set(theirs) if theirs[seed] > 0)
        if apart:
            ratios = [ours[seed] / theirs[seed] for seed in apart]
            figures["symmetric KL, copd : independent"] = _decided(over_seeds(ratios), len(ratios))
    return figures


def _per_seed(curves: Mapping[str, Any], reduce: Any) -> dict[int, float]:
    """Per seed, the mean over pairs of trained branches of a reduction of the pair's curve."""
    per: dict[int, list[float]] = {}
    for pair, seeds in curves.items():
        if pair.endswith("-start"):
            continue
        for seed, points in seeds.items():
            per.setdefault(int(seed), []).append(reduce([value for _, value in points]))
    return {seed: float(np.mean(values)) for seed, values in per.items()}


def _correlation(points: Sequence[Mapping[str, float]]) -> Estimate:
    """Pearson's r over all points, with an interval that draws seeds."""
    seeds = sorted({point["seed"] for point in points})
    rng = np.random.default_rng(0)

    def r_of(chosen: Sequence[float]) -> float:
        rows = [p for seed in chosen for p in points if p["seed"] == seed]
        x, y = np.asarray([p["overlap"] for p in rows]), np.asarray([p["gain"] for p in rows])
        return float(np.corrcoef(x, y)[0, 1]) if x.std() and y.std() else math.nan

    value = r_of(seeds)
    draws = [r_of(rng.choice(seeds, len(seeds)).tolist()) for _ in range(2000)]
    low, high = np.nanquantile(draws, [0.025, 0.975])
    found = Estimate(value=value, low=min(float(low), value), high=max(float(high), value))
    return _decided(found, len(seeds))
