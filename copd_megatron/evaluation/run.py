"""The one evaluation that training, ``copd eval`` and the final table use.

It does not depend on what samples the responses: a ``Sampler`` turns prompts into graded rollouts, on all
ranks of a training branch or in the single process of ``copd eval``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

from copd_megatron.config.schema import EvaluationConfig
from copd_megatron.records import Prompt, Rollout
from copd_megatron.rollout.engine import SamplingSettings

logger = logging.getLogger(__name__)

Sampler = Callable[[Sequence[Prompt], SamplingSettings, str], list[Rollout]]
"""(prompts, settings, purpose) to graded rollouts of all prompts. ``purpose`` is part of the sampling
seeds."""

Accuracies = dict[str, dict[str, float]]
"""Model name to domain to mean verifier score."""


def sampling_settings(options: EvaluationConfig) -> SamplingSettings:
    """How validation prompts are sampled: greedy, unless ``evaluation.temperature`` says otherwise."""
    return SamplingSettings(
        num_generations=options.num_generations_per_prompt, temperature=options.temperature
    )


def accuracy(
    sample: Sampler,
    validation: Mapping[str, Sequence[Prompt]],
    options: EvaluationConfig,
    *,
    domains: Iterable[str] | None = None,
) -> dict[str, float]:
    """Mean verifier score of each domain.

    Args:
        sample: samples and grades responses.
        validation: validation prompts by domain.
        domains: domains to score; None means all.

    Returns:
        Domain to the mean reward of all its responses.
    """
    settings = sampling_settings(options)
    scores = {}
    for domain in validation if domains is None else domains:
        logger.info("evaluating %d prompts of %s", len(validation[domain]), domain)
        graded = sample(validation[domain], settings, f"validation/{domain}")
        scores[domain] = sum(rollout.reward or 0.0 for rollout in graded) / len(graded)
    return scores


def num_prompts(validation: Mapping[str, Sequence[Prompt]]) -> dict[str, int]:
    """Number of prompts of each domain, for the header of the table."""
    return {domain: len(prompts) for domain, prompts in validation.items()}
