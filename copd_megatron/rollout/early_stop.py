"""Sampling more prompts than a step needs and stopping once enough are complete. Pure.

A step waits for its longest response. With over-sampling, the step starts more prompts than it needs and
moves on once enough of them have all their responses. The unfinished responses are then discarded, which
favours prompts with short responses, or (partial rollouts) carried into the next step and continued with the
new weights. A continued response keeps the version of the weights that began it, so that the actor's limit on
weight lag applies, and the log-probabilities under which each of its tokens was sampled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from copd_megatron.data.occurrences import number_occurrences
from copd_megatron.records import Prompt, Rollout

Group = tuple[Rollout, ...]
"""All samples of one prompt, finished or not, in sample order."""


@dataclass(frozen=True, kw_only=True)
class EarlyStop:
    """When to stop, and the responses that an earlier step began."""

    num_prompts: int
    """Stop once this many prompts, over all rollout replicas, have all their responses."""
    begun: Mapping[tuple[str, int], Rollout] = field(default_factory=dict)
    """By group id and sample: responses of an earlier step that are continued or, if finished, kept."""


def num_asked(wanted: int, over_sampling: float) -> int:
    """Number of prompts to start so that ``wanted`` are completed."""
    return math.ceil(wanted * (1 + over_sampling))


def split_groups(
    rollouts: Sequence[Rollout], num_generations: int, wanted: int
) -> tuple[list[Rollout], list[Group]]:
    """(rollouts of the first ``wanted`` complete groups, the remaining groups that have any response token).

    ``rollouts`` are ordered by prompt, then by sample, ``num_generations`` to a prompt.
    """
    taken: list[Rollout] = []
    left: list[Group] = []
    for begin in range(0, len(rollouts), num_generations):
        group = tuple(rollouts[begin : begin + num_generations])
        if len(taken) < wanted * num_generations and not any(r.unfinished for r in group):
            taken += group
        elif any(r.response_length for r in group):
            left.append(group)
    return taken, left


def carried(groups: Sequence[Group], *, version: int, max_lag: int) -> list[Group]:
    """The groups that may be continued by weights of this ``version`` and still be trained on.

    That is, groups without media (a placeholder token in the response would be mistaken for a medium) none
    of whose parts are older than ``max_lag`` versions.
    """
    return [
        group
        for group in groups
        if not group[0].media and version - min(r.weight_version for r in group) <= max_lag
    ]


def continued(
    prompts: Sequence[Prompt], groups: Sequence[Group], drawn: Sequence[Prompt] = ()
) -> list[Prompt]:
    """The prompts of carried groups first, then the new ones, numbered so that no two share a group id.

    ``drawn``: further prompts of the step, whose group ids are taken too.
    """
    first = [group[0].prompt for group in groups]
    return first + number_occurrences(prompts, drawn=[*drawn, *first])


def to_state(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Groups as plain values for a checkpoint; JSON preserves every float32 exactly.

    Groups with media are left out: they are never continued.
    """
    return [
        {
            "prompt": _plain(group[0].prompt, without=("media",)),
            "samples": [_plain(rollout, without=("prompt",)) for rollout in group],
        }
        for group in groups
        if not group[0].media
    ]


def from_state(state: Sequence[Mapping[str, Any]]) -> list[Group]:
    """The groups that ``to_state`` was given, without those that have media."""
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
