"""What travels between the stages of a step, as frozen records.

Shape legend: ``P`` prompt tokens, ``R`` response tokens, ``L = P + R``.

One convention prevents off-by-one errors everywhere: **per-token arrays are aligned to response tokens**.
Element ``i`` of ``rollout_logprobs``, ``advantages``, ``loss_mask`` ... belongs to token
``token_ids[P + i]``, and is computed from the logits at position ``P + i - 1``.

Worked example: prompt ``[5, 6, 7]``, response ``[8, 9]``: ``token_ids = [5, 6, 7, 8, 9]``,
``prompt_length = 3``; ``rollout_logprobs[0] = log p(8 | 5, 6, 7)``, from the logits at position 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One task from a shard, tokenised with the chat template."""

    prompt_id: str
    """Unique in its data set and stable over runs: ``<shard name>/<key>``."""
    domain: str
    """Branch whose data it comes from."""
    token_ids: IntArray
    """[P]"""
    answer: str
    """Gold answer, as the verifier expects it."""
    verifier: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One sampled response."""

    prompt: Prompt
    sample_index: int
    """0 .. G-1 in its group."""
    token_ids: IntArray
    """[L] prompt and response, the end-of-sequence token included when it was sampled."""
    rollout_logprobs: FloatArray
    """[R] log-probabilities of the sampled tokens under the rollout engine, at its temperature."""
    text: str
    """The response, decoded, special tokens left out."""
    truncated: bool
    """The token limit was reached before a stop."""
    weight_version: int
    """Version of the weights that sampled it."""
    seed: int
    reward: float | None = None
    """Verifier's grade; None: not graded."""

    @property
    def prompt_length(self) -> int:
        return len(self.prompt.token_ids)

    @property
    def response_length(self) -> int:
        return len(self.token_ids) - len(self.prompt.token_ids)


@dataclass(frozen=True, kw_only=True)
class TrainRow:
    """One sequence and its per-token streams: all that the actor needs to know for an update."""

    token_ids: IntArray
    """[L]"""
    prompt_length: int
    advantages: FloatArray
    """[R]"""
    loss_mask: FloatArray
    """[R] 1 trains on the token, 0 leaves it out."""
    component: str
    """``native`` or ``cross:<teacher>``; each component is normalised by its own global counts."""
    component_weight: float = 1.0
    """Factor on the component's normalised loss."""
    old_logprobs: FloatArray | None = None
    """[R] under the actor at the start of the step; None: taken from the first forward pass."""
    rollout_logprobs: FloatArray | None = None
    """[R] under the rollout engine."""
    reference_logprobs: FloatArray | None = None
    """[R] under the reference policy, for the KL term."""
    weight_version: int = 0

    @property
    def response_length(self) -> int:
        return len(self.token_ids) - self.prompt_length
