"""The one evaluation that training, ``copd eval`` and the final table use.

It does not depend on what samples the responses: a ``Sampler`` turns prompts into graded rollouts, on all
ranks of a training branch or in the single process of ``copd eval``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from copd_megatron.config import Config
from copd_megatron.config.domains import domains_by_name
from copd_megatron.evaluation.table import Score
from copd_megatron.records import Prompt, Rollout
from copd_megatron.rollout.engine import SamplingSettings

logger = logging.getLogger(__name__)

Sampler = Callable[[Sequence[Prompt], SamplingSettings, str], list[Rollout]]
"""(prompts, settings, purpose) to graded rollouts of all prompts. ``purpose`` is part of the sampling
seeds."""

Accuracies = dict[str, dict[str, Score]]
"""Model name to domain to what the model scored there."""


def sampling_settings(config: Config, domain: str) -> SamplingSettings:
    """How validation prompts of a domain are sampled: greedy, unless ``evaluation.temperature`` says
    otherwise. A response may be as long as in training on that domain, and ends at the same strings,
    whichever model answers."""
    options, branch = config.evaluation, domains_by_name(config)[domain].branch
    rollout = config.branches[branch].rollout
    return SamplingSettings(
        num_generations=options.num_generations_per_prompt,
        temperature=options.temperature,
        max_new_tokens=rollout.max_new_tokens,
        stop=tuple(rollout.stop),
    )


def accuracy(
    sample: Sampler,
    validation: Mapping[str, Sequence[Prompt]],
    config: Config,
    *,
    domains: Iterable[str] | None = None,
) -> dict[str, Score]:
    """What the sampled model scores on each domain.

    Args:
        sample: samples and grades responses.
        validation: validation prompts by domain.
        domains: domains to score; None means all.
    """
    scores = {}
    for domain in validation if domains is None else domains:
        logger.info("evaluating %d prompts of %s", len(validation[domain]), domain)
        rollouts = sample(validation[domain], sampling_settings(config, domain), f"validation/{domain}")
        scores[domain] = score_of([r.reward for r in rollouts if r.reward is not None])
    return scores


def score_of(rewards: Sequence[float]) -> Score:
    """The score that rewards add up to: an accuracy where each is 0 or 1. NaN without any."""
    if not rewards:
        return math.nan
    mean = sum(rewards) / len(rewards)
    if all(reward in (0.0, 1.0) for reward in rewards):
        return mean
    return {"mean_reward": mean, "full_marks": sum(reward >= 1.0 for reward in rewards) / len(rewards)}


def solved(rollouts: Sequence[Rollout]) -> frozenset[str]:
    """Ids of the prompts of which at least half of the responses got full marks."""
    marks: dict[str, list[bool]] = {}
    for rollout in rollouts:
        full = rollout.reward is not None and rollout.reward >= 1.0
        marks.setdefault(rollout.prompt.prompt_id, []).append(full)
    return frozenset(prompt for prompt, full in marks.items() if 2 * sum(full) >= len(full))


def num_prompts(validation: Mapping[str, Sequence[Prompt]]) -> dict[str, int]:
    """Number of prompts of each domain, for the header of the table."""
    return {domain: len(prompts) for domain, prompts in validation.items()}
