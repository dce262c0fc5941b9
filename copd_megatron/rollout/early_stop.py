"""Sampling more prompts than a step needs and stopping when enough are done. Pure.

A step waits for its longest response. With over-sampling, further prompts are begun beside those wanted,
and the step goes on when as many as wanted have all their responses. What is unfinished then is thrown away,
which favours prompts with short responses, or (partial rollouts) carried to the next step and continued under
the new weights; such a response has the version of the weights that began it, so that the actor's limit on
the weight lag applies, and keeps the log-probabilities under which each token was sampled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from copd_megatron.records import Prompt, Rollout

Group = tuple[Rollout, ...]
"""All samples of one prompt, finished or not, in sample order."""


@dataclass(frozen=True, kw_only=True)
class EarlyStop:
    """When to stop, and what has been begun already."""

    num_prompts: int
    """Prompts whose responses must all be there, over all rollout replicas."""
    begun: Mapping[tuple[str, int], Rollout] = field(default_factory=dict)
    """By prompt id and sample: responses of an earlier step, to be continued, or (finished) taken over."""


def num_asked(wanted: int, over_sampling: float) -> int:
    """Prompts that are begun so that ``wanted`` get done."""
    return math.ceil(wanted * (1 + over_sampling))


def split_groups(
    rollouts: Sequence[Rollout], num_generations: int, wanted: int
) -> tuple[list[Rollout], list[Group]]:
    """(rollouts of the first ``wanted`` complete groups, the other groups of which anything is there)."""
    groups = [tuple(rollouts[i : i + num_generations]) for i in range(0, len(rollouts), num_generations)]
    complete = [group for group in groups if not any(r.unfinished for r in group)]
    taken = complete[:wanted]
    left = [g for g in groups if g not in taken and any(r.response_length for r in g)]
    return [r for group in taken for r in group], left


def carried(groups: Sequence[Group], *, version: int, max_lag: int) -> list[Group]:
    """The groups that may still be trained on after this step's update, ``version`` being the weights that
    will continue them: text only (a response's tokens must not be taken for placeholders of media), and no
    part older than ``max_lag`` versions."""
    return [
        group
        for group in groups
        if not group[0].media and version - min(r.weight_version for r in group) <= max_lag
    ]


def continued(prompts: Sequence[Prompt], groups: Sequence[Group]) -> list[Prompt]:
    """The prompts of carried groups first, then the new ones, each prompt once."""
    first = [group[0].prompt for group in groups]
    known = {prompt.prompt_id for prompt in first}
    return first + [prompt for prompt in prompts if prompt.prompt_id not in known]


def to_state(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Groups as plain values for a checkpoint (JSON keeps every float32 as it is). Those with media, which
    are never continued, are left out."""
    return [
        {
            "prompt": _plain(group[0].prompt, without=("media",)),
            "samples": [_plain(rollout, without=("prompt",)) for rollout in group],
        }
        for group in groups
        if not group[0].media
    ]


def from_state(state: Sequence[Mapping[str, Any]]) -> list[Group]:
    """What ``to_state`` was given."""
    groups = []
    for entry in state:
        tokens = np.asarray(entry["prompt"]["token_ids"], dtype=np.int32)
        prompt = Prompt(**{**entry["prompt"], "token_ids": tokens})
        groups.append(
            tuple(
                Rollout(
                    **{
                        **sample,
                        "prompt": prompt,
                        "token_ids": np.asarray(sample["token_ids"], dtype=np.int32),
                        "rollout_logprobs": np.asarray(sample["rollout_logprobs"], dtype=np.float32),
                    }
                )
                for sample in entry["samples"]
            )
        )
    return groups


def _plain(record: Prompt | Rollout, without: Sequence[str]) -> dict[str, Any]:
    values = {item.name: getattr(record, item.name) for item in fields(record) if item.name not in without}
    return {
        name: value.tolist()
        if isinstance(value, np.ndarray)
        else dict(value)
        if isinstance(value, Mapping)
        else value
        for name, value in values.items()
    }
