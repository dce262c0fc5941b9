"""What a branch has asked its teachers, and what it keeps until they answer.

With ``opd.max_teacher_lag`` a step's questions are asked in the step before, so that they are open when the
branch saves a checkpoint. ``to_bytes`` writes them down; the branch asks them again when it goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from copd_megatron.config.graph import Edge
from copd_megatron.policy.scores import SequenceScore
from copd_megatron.records import Ask, IntArray, MediaRef, Prompt, Rollout, TopK
from copd_megatron.topology.messages import MessageError, decode, encode, register


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What an edge's rows are made of."""

    rollouts: Sequence[Rollout]
    own: Sequence[SequenceScore] | None
    """What the student's own actor says of them, with the weights that sampled them; None: it has not been
    asked yet."""
    prompts: Sequence[IntArray | None]
    """[P'] what the teacher reads instead of each rollout's prompt; None: nothing, and the rollout teaches
    nothing."""
    is_open: Sequence[bool]
    """Whether the teacher may teach on it."""

    @property
    def taught(self) -> list[int]:
        """Which rollouts the teacher is asked about."""
        return [i for i, prompt in enumerate(self.prompts) if prompt is not None]


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A rollout, and what a teacher is asked about it."""

    rollout: Rollout
    ask: Ask


@dataclass(frozen=True, kw_only=True)
class Asked:
    """All that a branch asks in one exchange."""

    lessons: Mapping[Edge, Lesson]
    """By edge into the branch; in Phase I there are none."""
    probes: Sequence[Probe]
    """The same for every edge that crosses."""


for _record in (Lesson, Probe, Ask, MediaRef, Prompt, Rollout, SequenceScore, TopK):
    register(_record)


def to_bytes(asked: Asked) -> bytes:
    """The questions as bytes that cannot run as code."""
    lessons = {edge.name: _without_entropy(lesson) for edge, lesson in asked.lessons.items()}
    return encode({"lessons": lessons, "probes": list(asked.probes)})


def from_bytes(data: bytes, edges: Sequence[Edge]) -> Asked:
    """The questions that ``to_bytes`` was given, those of edges that are no longer there left out.

    Args:
        edges: those into the branch.

    Raises:
        ValueError: the bytes hold something else.
    """
    try:
        state = decode(data)
    except MessageError as error:
        raise ValueError(str(error)) from error
    lessons, probes = state["lessons"], state["probes"]
    if not all(type(x) is Lesson for x in lessons.values()) or not all(type(x) is Probe for x in probes):
        raise ValueError("its questions to teachers are no lessons and probes")
    by_name = {edge.name: edge for edge in edges}
    known = {by_name[name]: lesson for name, lesson in lessons.items() if name in by_name}
    return Asked(lessons=known, probes=probes)


def _without_entropy(lesson: Lesson) -> Lesson:
    """The lesson without those of the student's scores that no row is made of."""
    if lesson.own is None:
        return lesson
    nothing = np.zeros(0, dtype=np.float32)
    own = [replace(said, entropy=nothing, state_logprobs=nothing.reshape(0, 0)) for said in lesson.own]
    return replace(lesson, own=own)
