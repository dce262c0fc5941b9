"""Whether a setting can tell recipes apart: decided on experts and mixed training alone, before CoPD is run.

The thresholds were written down before the first setting was tried.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from copd_megatron.reproduction.scores import DomainValues, macro

BASE_RANGE = (0.10, 0.35)
EXPERT_RANGE = (0.45, 0.85)
MOST_TRANSFER = 0.5
"""An expert's gain on the other domain is less than this share of its gain on its own."""


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """One criterion, the figures it was decided by, and whether they satisfy it."""

    text: str
    figures: str
    met: bool
    required: bool = True
    """False: the page says what was found either way."""


def criteria(
    domains: Sequence[str], seeds: Sequence[Mapping[str, DomainValues]], lengths: Mapping[str, int]
) -> list[Criterion]:
    """The criteria with their figures, as means over the tuning seeds.

    Args:
        seeds: per seed, the scores of ``base``, ``expert.<domain>`` and ``mixed_longer``.
        lengths: response length of each domain's right answers, in tokens.
    """

    def mean(model: str, domain: str) -> float:
        return float(np.mean([macro(scores[model], domain) for scores in seeds]))

    base = {d: mean("base", d) for d in domains}
    own = {d: mean(f"expert.{d}", d) for d in domains}
    gains = {d: own[d] - base[d] for d in domains}
    others = {
        (d, other): mean(f"expert.{d}", other) - base[other]
        for d in domains
        for other in domains
        if d != other
    }
    mixed = {d: mean("mixed_longer", d) for d in domains}
    return [
        Criterion(
            text="the base solves 10 to 35 % of each domain",
            figures=_percent(base),
            met=all(BASE_RANGE[0] <= value <= BASE_RANGE[1] for value in base.values()),
        ),
        Criterion(
            text="an expert ends between 45 and 85 % on its own domain",
            figures=_percent(own),
            met=all(EXPERT_RANGE[0] <= value <= EXPERT_RANGE[1] for value in own.values()),
        ),
        Criterion(
            text="an expert gains less than half as much on another domain",
            figures=", ".join(f"{d} on {o} {100 * gain:+.1f}" for (d, o), gain in others.items()),
            met=all(gain < MOST_TRANSFER * gains[d] for (d, _), gain in others.items()),
        ),
        Criterion(
            text="mixed RLVR with all steps loses to an expert on a domain (conflict)",
            figures=_percent(mixed),
            met=any(mixed[d] < own[d] for d in domains),
            required=False,
        ),
        Criterion(
            text="domains differ in the length of an answer or in how often a base is rewarded",
            figures=", ".join(f"{d} {lengths[d]} tokens" for d in domains),
            met=len(set(lengths.values())) > 1 or max(base.values()) > 1.3 * min(base.values()),
        ),
    ]


def _percent(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {100 * value:.1f}" for name, value in values.items())
