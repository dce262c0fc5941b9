"""Rollouts to be graded, without a model."""

from __future__ import annotations

from typing import Any

import numpy as np

from copd_megatron.records import Prompt, Rollout

COMMAND = "tests.support.misbehaving_verifiers:by_command"
"""A verifier that does what the response says."""


def rollout(
    text: str,
    answer: str = "",
    verifier: str = COMMAND,
    metadata: dict[str, Any] | None = None,
    key: str = "k",
    truncated: bool = False,
    opens_thinking: bool = False,
) -> Rollout:
    """A response to a prompt of its own."""
    prompt = Prompt(
        prompt_id=f"shard-000000/{key}",
        domain="text",
        token_ids=np.zeros(1, np.int32),
        answer=answer,
        verifier=verifier,
        metadata=metadata or {},
        opens_thinking=opens_thinking,
    )
    return Rollout(
        prompt=prompt,
        sample_index=0,
        token_ids=np.zeros(2, np.int32),
        rollout_logprobs=np.zeros(1, np.float32),
        text=text,
        truncated=truncated,
        weight_version=0,
        seed=0,
    )
