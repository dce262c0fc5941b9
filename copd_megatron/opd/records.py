"""What crosses between branches, as frozen records.

Shape legend: ``L`` tokens of prompt plus response, ``R`` response tokens, ``s`` states of a row that are
asked about, ``V`` vocabulary. Alignment as in ``copd_megatron.records``: element ``i`` of a ``[R]`` array
belongs to token ``token_ids[prompt_length + i]`` and comes from the logits one position earlier. A *state* is
a response position; its distribution is the one from which that token was drawn.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np

from copd_megatron.records import Ask, FloatArray, IntArray, MediaRef, TopK

_NOTHING: Final = Ask()


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoreRequest:
    """A student's row, for the teacher to score."""

    row_id: int
    """The row's number in its exchange, from 0; comes back unchanged in the ``TeacherScore``."""
    token_ids: IntArray
    """[L]"""
    prompt_length: int
    weight_version: int
    """Version of the student's weights that sampled it."""
    ask: Ask = _NOTHING
    """What the teacher is to say about it."""
    support_ids: IntArray | None = None
    """[R, k] ids whose log-probabilities ``ask.support`` wants; -1 marks an empty place."""
    media: tuple[MediaRef, ...] = ()
    """Images and videos of the prompt, by reference: the teacher reads them itself."""

    @property
    def response_length(self) -> int:
        return len(self.token_ids) - self.prompt_length


@dataclass(frozen=True, kw_only=True, eq=False)
class TeacherScore:
    """What the teacher says of a row."""

    row_id: int
    weight_version: int
    """Version of the teacher's weights that scored it."""
    logprobs: FloatArray = field(default_factory=lambda: np.empty(0, dtype=np.float32))
    """[R] log pi_teacher of the row's response tokens; empty unless ``ask.tokens``."""
    distributions: FloatArray = field(default_factory=lambda: np.empty((0, 0), dtype=np.float32))
    """[s, V] the teacher's log-probabilities of the whole vocabulary at ``ask.positions``."""
    top: TopK | None = None
    """[R, k] its likeliest ids; None unless ``ask.top_k``."""
    support_logprobs: FloatArray | None = None
    """[R, k] its log-probabilities at ``support_ids``, 0 in empty places; None unless ``ask.support``."""
    entropy: FloatArray | None = None
    """[R] nats; None unless ``ask.entropy``."""
    samples: tuple[IntArray, ...] = ()
    """Token ids of the ``ask.samples`` responses that it sampled."""
