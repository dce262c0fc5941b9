"""Rollouts and training rows by hand, and Eq. 11 in plain loops."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from copd_megatron.records import Prompt, Rollout, TrainRow

MAX_NEW_TOKENS = 8


def make_rollout(
    prompt_id: str, sample: int, length: int, reward: float | None, **changes: object
) -> Rollout:
    """Random tokens after a prompt of two; ``changes`` are fields of the rollout."""
    generator = np.random.default_rng([sample, length, *map(ord, prompt_id)])
    prompt = Prompt(
        prompt_id=prompt_id,
        domain="text",
        token_ids=np.array([1, 2], dtype=np.int32),
        answer="",
        verifier="exact",
    )
    rollout = Rollout(
        prompt=prompt,
        sample_index=sample,
        token_ids=np.concatenate([prompt.token_ids, generator.integers(3, 9, length)]).astype(np.int32),
        rollout_logprobs=-generator.random(length).astype(np.float32),
        text="",
        truncated=False,
        weight_version=7,
        seed=0,
        reward=reward,
    )
    return replace(rollout, **changes)


def make_row(component: str, mask: list[int], weight: float = 1.0) -> TrainRow:
    """A row without advantages, for what depends on masks and components alone."""
    return TrainRow(
        token_ids=np.arange(len(mask) + 1, dtype=np.int32),
        prompt_length=1,
        advantages=np.zeros(len(mask), dtype=np.float32),
        loss_mask=np.array(mask, dtype=np.float32),
        component=component,
        component_weight=weight,
    )


def slow_grpo(rewards: list[float], groups: list, *, normalize: bool, epsilon: float) -> list[float]:
    """Advantages over each group's mean and sample standard deviation, reward by reward."""
    result = []
    for reward, group in zip(rewards, groups, strict=True):
        members = [r for r, g in zip(rewards, groups, strict=True) if g == group]
        mean = math.fsum(members) / len(members)
        if len(set(members)) == 1:
            result.append(0.0)
            continue
        variance = math.fsum((r - mean) ** 2 for r in members) / (len(members) - 1)
        result.append((reward - mean) / (math.sqrt(variance) + epsilon) if normalize else reward - mean)
    return result
