"""One evaluation for everybody: training, ``copd eval`` and the final table score prompts through here.

It does not know what answers. A ``Sampler`` turns prompts into graded rollouts, wherever they are sampled: on
all ranks of a training branch, or in the one process of ``copd eval``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from copd_megatron.config.schema import EvaluationConfig
from copd_megatron.records import Prompt, Rollout
from copd_megatron.rollout.engine import SamplingSettings

Sampler = Callable[[Sequence[Prompt], SamplingSettings, str], list[Rollout]]
"""(prompts, settings, purpose) to graded rollouts of all of them. ``purpose`` enters the sampling seeds."""

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
        sample: what answers and grades.
        validation: validation prompts by domain.
        domains: which of them to score; None: all.

    Returns:
        Domain to the mean reward over all of its responses.
    """
    settings = sampling_settings(options)
    scores = {}
    for domain in validation if domains is None else domains:
        graded = sample(validation[domain], settings, f"validation/{domain}")
        scores[domain] = sum(rollout.reward or 0.0 for rollout in graded) / len(graded)
    return scores


def num_prompts(validation: Mapping[str, Sequence[Prompt]]) -> dict[str, int]:
    """Prompts of each domain, for the table's header."""
    return {domain: len(prompts) for domain, prompts in validation.items()}
