"""Verdicts of several models, summed up: figures with intervals by domain, verifier or metadata, and paired
differences. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from copd_megatron.evaluation.statistics import (
    Estimate,
    bootstrap,
    majority_at_k,
    mean_at_n,
    mean_of_groups,
    paired_difference,
    pass_at_k,
    share,
    wilson,
)
from copd_megatron.evaluation.verdicts import PromptVerdicts

Verdicts = Mapping[str, Sequence[PromptVerdicts]]
"""Model to its verdicts, models in row order."""
POOLED = "all prompts"
"""Group of the prompts of all domains together."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What one model's responses to a group of prompts add up to. Shares lie in [0, 1]."""

    num_prompts: int
    num_responses: int
    num_ungraded: int
    accuracy: Estimate
    """Share of responses with a reward of at least 1, averaged over prompts (mean@n)."""
    mean_reward: Estimate
    """On the verifier's own scale, averaged over prompts."""
    pass_at: Mapping[int, Estimate]
    """k to pass@k, over the prompts with at least k graded responses."""
    majority_at: Mapping[int, Estimate]
    """k to the share of right majority answers."""
    truncated: float
    mean_tokens: float


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One model against another on the prompts that both answered."""

    model: str
    against: str
    group: str
    num_prompts: int
    accuracy: Estimate
    mean_reward: Estimate


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Several models on the same prompts."""

    domains: Sequence[str]
    models: Mapping[str, Mapping[str, Figures]]
    """Model to domain to figures."""
    means: Mapping[str, Estimate]
    """Model to the plain mean of its accuracies over the domains; not a number where it lacks one."""
    by: Mapping[str, Mapping[str, Mapping[str, Figures]]] = field(default_factory=dict)
    """``verifier`` or a metadata key to model to value to figures."""
    differences: Sequence[Difference] = ()
    """Every other model against the first."""


def summarise(verdicts: Verdicts, *, by: Sequence[str] = ()) -> Summary:
    """Sums up.

    Args:
        by: metadata keys to group by, besides domains; ``verifier`` groups by verifier. Prompts without the
            key are left out.
    """
    domains = list(dict.fromkeys(v.domain for rows in verdicts.values() for v in rows))
    models = {model: _grouped(rows, lambda v: v.domain) for model, rows in verdicts.items()}
    return Summary(
        domains=domains,
        models=models,
        means={
            model: mean_of_groups([_rights([v for v in rows if v.domain == domain]) for domain in domains])
            for model, rows in verdicts.items()
        },
        by={key: {model: _grouped(rows, _value_of(key)) for model, rows in verdicts.items()} for key in by},
        differences=_differences(verdicts, domains),
    )


def figures_of(rows: Sequence[PromptVerdicts]) -> Figures:
    """The figures of a group of prompts."""
    graded = [row.graded for row in rows if row.graded]
    right = [[float(reward >= 1.0) for reward in rewards] for rewards in graded]
    counts = [len(rewards) for rewards in graded]
    ks = _ks(max(counts, default=0))
    lengths = [length for row in rows for length in row.num_tokens]
    cut = [flag for row in rows for flag in row.truncated]
    single = bool(counts) and max(counts) == 1
    return Figures(
        num_prompts=len(rows),
        num_responses=len(lengths),
        num_ungraded=sum(reward is None for row in rows for reward in row.rewards),
        accuracy=(
            wilson(sum(map(round, map(sum, right))), len(right)) if single else share(mean_at_n(right))
        ),
        mean_reward=bootstrap(mean_at_n(graded)),
        pass_at={k: share([pass_at_k(len(r), round(sum(r)), k) for r in right if len(r) >= k]) for k in ks},
        majority_at={k: share(_majorities(rows, k)) for k in ks[1:]},
        truncated=sum(cut) / len(cut) if cut else math.nan,
        mean_tokens=sum(lengths) / len(lengths) if lengths else math.nan,
    )


def _majorities(rows: Sequence[PromptVerdicts], k: int) -> list[float]:
    """maj@k of each prompt with at least k graded responses."""
    found = []
    for row in rows:
        pairs = [(a, float(r >= 1.0)) for a, r in zip(row.answers, row.rewards, strict=True) if r is not None]
        if len(pairs) >= k:
            found.append(majority_at_k([a for a, _ in pairs], [r for _, r in pairs], k))
    return found


def _ks(most: int) -> list[int]:
    """1, 2, 4, ... and the number of responses itself."""
    powers = [2**i for i in range(most.bit_length()) if 2**i <= most]
    return sorted({*powers, most}) if most else []


def _grouped(
    rows: Sequence[PromptVerdicts], name_of: Callable[[PromptVerdicts], str | None]
) -> dict[str, Figures]:
    groups: dict[str, list[PromptVerdicts]] = {}
    for row in rows:
        if (name := name_of(row)) is not None:
            groups.setdefault(name, []).append(row)
    return {name: figures_of(members) for name, members in groups.items()}


def _value_of(key: str) -> Callable[[PromptVerdicts], str | None]:
    if key == "verifier":
        return lambda row: row.verifier
    return lambda row: None if row.metadata.get(key) is None else str(row.metadata[key])


def _rights(rows: Sequence[PromptVerdicts]) -> list[float]:
    """Share of right responses to each prompt that has a graded one."""
    return list(_by_prompt(rows, right=True).values())


def _by_prompt(rows: Sequence[PromptVerdicts], *, right: bool) -> dict[str, float]:
    """Prompt to the mean of its rewards, or of their being 1 or more."""
    return {
        f"{row.domain}/{row.prompt}": math.fsum(float(x >= 1.0) if right else x for x in row.graded)
        / len(row.graded)
        for row in rows
        if row.graded
    }


def _differences(verdicts: Verdicts, domains: Sequence[str]) -> list[Difference]:
    """By domain, and over all prompts where there are several domains."""
    (first, *others) = verdicts or [""]
    found = []
    for model in others:
        for group in [*domains, *([POOLED] if len(domains) > 1 else [])]:
            ours, theirs = (
                [row for row in verdicts[name] if group in (POOLED, row.domain)] for name in (model, first)
            )
            found.append(_difference(model, first, group, ours, theirs))
    return found


def _difference(
    model: str, against: str, group: str, ours: Sequence[PromptVerdicts], theirs: Sequence[PromptVerdicts]
) -> Difference:
    mine, other = _by_prompt(ours, right=True), _by_prompt(theirs, right=True)
    return Difference(
        model=model,
        against=against,
        group=group,
        num_prompts=len(mine.keys() & other.keys()),
        accuracy=paired_difference(mine, other),
        mean_reward=paired_difference(_by_prompt(ours, right=False), _by_prompt(theirs, right=False)),
    )
