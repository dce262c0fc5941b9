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
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

NATIVE = "native"
"""Component of a branch's own rows; rows that a teacher scored have the component of their edge."""

LARGEST_REWARD = 1e9
"""The most that a reward may be, with either sign. Means, squares and differences of such rewards are finite
and readable wherever they are written."""

IntArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class MediaRef:
    """One image or video of a prompt, by reference: what crosses branches in place of pixels.

    Worked example: ``MediaRef(source="image/train", shard="count-train-000000", key="000000017",
    extension="0.png", kind="image", content_hash="9f2c...")`` is member ``000000017.0.png`` of that shard.
    """

    source: str
    """Shard set that holds it, under the name that every branch opened it: ``<domain>/train``."""
    shard: str
    """Name of the shard within its set."""
    key: str
    """Key of the sample in the shard."""
    extension: str
    """Which member of the sample: ``0.png``, ``mp4``."""
    kind: str
    """``image`` or ``video``."""
    content_hash: str
    """BLAKE2b (16 bytes, hexadecimal) of the encoded file; whoever reads it again compares."""

    def __str__(self) -> str:
        return f"{self.source}:{self.shard}/{self.key}.{self.extension}"


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One task from a shard, tokenised with the chat template."""

    prompt_id: str
    """Unique in its branch's data and stable over runs: ``<shard name>/<key>``, in a pool
    ``<pool>/<shard name>/<key>``."""
    domain: str
    """Branch whose data it comes from, or the pool of a branch that has several."""
    token_ids: IntArray
    """[P]; placeholders of media are expanded, one token per merged patch."""
    answer: str
    """Gold answer, as the verifier expects it."""
    verifier: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    media: tuple[MediaRef, ...] = ()
    """Images and videos, in the order of their placeholders."""
    occurrence: int = 0
    """0 the first time a prompt is drawn for a step, 1 the second time, and so on: a small data set repeats
    its prompts where one epoch ends and the next begins."""
    opens_thinking: bool = False
    """It ends with ``<think>``, as some chat templates have it: the response begins in the middle of
    thinking."""

    @property
    def group_id(self) -> str:
        """Identifies the prompt among all prompts of a step: the key of its sampling seeds and of its group
        of responses. It is ``prompt_id``, then ``<prompt_id>.1`` for occurrence 1, and so on.

        The part of a prompt id after its last slash, a sample's key, never contains a dot.
        """
        return f"{self.prompt_id}.{self.occurrence}" if self.occurrence else self.prompt_id


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
    unfinished: bool = False
    """Sampling was stopped before the response's end (``rollout.early_stop``)."""

    @property
    def media(self) -> tuple[MediaRef, ...]:
        return self.prompt.media

    @property
    def prompt_length(self) -> int:
        return len(self.prompt.token_ids)

    @property
    def response_length(self) -> int:
        return len(self.token_ids) - len(self.prompt.token_ids)


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What one branch asks another about a row. ``Ask()`` asks nothing."""

    tokens: bool = False
    """The log-probability of every response token, [R]."""
    positions: tuple[int, ...] = ()
    """Response positions (0 .. R - 1) whose distribution over the whole vocabulary is asked, [s, V]."""
    everywhere: bool = False
    """Stands for all response positions, where their number is not known yet."""
    top_k: int = 0
    """The likeliest ids at every response token, and their log-probabilities, [R, k] each."""
    support: bool = False
    """The log-probabilities of ids that come along with the question, [R, k]."""
    entropy: bool = False
    """The entropy at every response token, [R]."""
    temperature: float = 1.0
    """Factor on the sampling temperature at which the answer is computed."""
    samples: int = 0
    """Responses to the row, which is a prompt alone, that the other branch samples."""
    max_new_tokens: int = 0
    """Longest of these, in tokens."""

    def of_row(self, response_length: int) -> Ask:
        """The same, with ``everywhere`` spelt out."""
        if not self.everywhere:
            return self
        return replace(self, everywhere=False, positions=tuple(range(response_length)))


@dataclass(frozen=True, kw_only=True, eq=False)
class TopK:
    """The k likeliest ids at each response token of a row."""

    ids: IntArray
    """[R, k], the likeliest first"""
    logprobs: FloatArray
    """[R, k]"""


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
    """``native`` or ``cross:<teacher>``. Each component is normalised by its own global counts, and has the
    token loss of its own objective."""
    component_weight: float = 1.0
    """Factor on the component's normalised loss."""
    old_logprobs: FloatArray | None = None
    """[R] under the actor at the start of the step; None: taken from the first forward pass."""
    rollout_logprobs: FloatArray | None = None
    """[R] under the rollout engine."""
    reference_logprobs: FloatArray | None = None
    """[R] under the reference policy, for the KL term."""
    support_ids: IntArray | None = None
    """[R, k] ids on which the row's loss compares distributions, -1 in empty places; None: the whole
    vocabulary, if there are ``target_logprobs``."""
    target_logprobs: FloatArray | None = None
    """[R, k] (or [R, V]) the teacher's log-probabilities there; None: the loss compares no distributions."""
    forward_weight: FloatArray | None = None
    """[R] factor on a forward KL that is added."""
    weight_version: int = 0
    media: tuple[MediaRef, ...] = ()
    """Images and videos of the prompt, in the order of their placeholders."""

    @property
    def response_length(self) -> int:
        return len(self.token_ids) - self.prompt_length
