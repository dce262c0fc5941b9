"""What is kept of a response, and how it is written as one JSON object."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from itertools import pairwise
from typing import Any

from copd_megatron.errors import DataError
from copd_megatron.records import LARGEST_REWARD
from copd_megatron.untrusted.json_text import load_object, made

MAX_TEXT_CHARACTERS = 4096
"""Longest gold answer, and longest metadata as JSON, that is kept."""


class Kind(Enum):
    """What a response was sampled for."""

    native = "native"
    """Training on the branch's own prompts."""
    cross = "cross"
    """Training on the prompts of an edge, scored by its teacher."""
    validation = "validation"
    """An evaluation."""


class Verdict(Enum):
    """A reward in a word."""

    right = "right"
    """A reward of 1 or more."""
    partial = "partial"
    """Between 0 and 1."""
    wrong = "wrong"
    """0 or less."""
    ungraded = "ungraded"
    """The verifier had no time for it."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One response with what was said of it.

    Per-token lists have one element per kept response token, in order. Of a long response only the first and
    the last tokens are kept: ``num_left_out`` tokens are missing at ``cut_at``.
    """

    step: int
    """Training step that sampled it (from 1). For an evaluation: the steps done before it."""
    kind: Kind
    model: str
    """The branch that sampled it, or ``base`` or ``merged``."""
    edge: str | None
    """``student<-teacher``; None for responses that no teacher scored."""
    domain: str
    """Branch whose data the prompt comes from."""
    prompt_id: str
    occurrence: int
    """How often the step had drawn the same prompt before."""
    sample_index: int
    """Number of the response in its group."""
    prompt: str
    gold: str
    verifier: str
    metadata: Mapping[str, Any]
    """The prompt's metadata: data, never interpreted."""
    media: Sequence[Mapping[str, str]]
    """Where the prompt's images and videos are: the fields of ``records.MediaRef``."""
    response: str
    """The kept tokens as text, special tokens included."""
    reward: float | None
    truncated: bool
    """The response reached its token limit."""
    num_prompt_tokens: int
    num_response_tokens: int
    """Of the whole response."""
    weight_version: int
    """Version of the weights that sampled it."""
    seed: int
    lengths: Sequence[int]
    """Characters of ``response`` that each kept token stands for."""
    student: Sequence[float | None]
    """Log-probability of each kept token under the model that sampled it, in nats; null: not finite."""
    teacher: Sequence[float | None] | None = None
    """The same under the edge's teacher."""
    cut_at: int | None = None
    """Kept tokens before the gap; None: all tokens are kept."""
    num_left_out: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What a newer version of the product wrote and this one does not know."""

    @property
    def verdict(self) -> Verdict:
        """The reward in a word."""
        if self.reward is None:
            return Verdict.ungraded
        if self.reward >= 1.0:
            return Verdict.right
        return Verdict.partial if self.reward > 0.0 else Verdict.wrong

    def pieces(self) -> list[str]:
        """The text of each kept token; they add up to ``response``."""
        ends = [0]
        for length in self.lengths:
            ends.append(ends[-1] + length)
        return [self.response[begin:end] for begin, end in pairwise(ends)]

    def log_ratios(self) -> list[float | None]:
        """log p(teacher) - log p(student) of each kept token; None where one of them is not known."""
        if self.teacher is None:
            return [None] * len(self.student)
        return [
            None if t is None or s is None else t - s for t, s in zip(self.teacher, self.student, strict=True)
        ]


def to_line(sample: Sample) -> str:
    """The sample as one line of JSON, without the newline."""
    record = asdict(sample)
    record |= {"kind": sample.kind.value, "verdict": sample.verdict.value}
    record.update(record.pop("extra"))
    return json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def from_line(line: str | bytes, where: str) -> Sample:
    """The sample that ``to_line`` wrote.

    Raises:
        DataError: the line is none; names ``where``.
    """
    try:
        record = load_object(line)
        record.pop("verdict", None)
        known = {item.name for item in fields(Sample)} - {"extra"}
        extra = {name: record.pop(name) for name in list(record) if name not in known}
        sample = made(Sample, {**record, "extra": extra})
        _check_tokens(sample)
    except ValueError as error:
        raise DataError(f"{where}: not a sample ({error}). Remove the file; others stay readable.") from error
    return sample


def _check_tokens(sample: Sample) -> None:
    """Raises ValueError if the per-token lists do not belong to the response."""
    counts = {len(sample.lengths), len(sample.student)}
    if sample.teacher is not None:
        counts.add(len(sample.teacher))
    if len(counts) != 1:
        raise ValueError(f"its per-token lists differ in length: {sorted(counts)}")
    known = [*sample.student, *(sample.teacher or ()), sample.reward]
    if any(value is not None and abs(value) > LARGEST_REWARD for value in known):
        raise ValueError(f"a log-probability or the reward is beyond {LARGEST_REWARD:g}")
    if min(sample.lengths, default=0) < 0 or sum(sample.lengths) != len(sample.response):
        raise ValueError("the lengths of its tokens do not add up to the response")


def rounded(logprobs: Sequence[float]) -> list[float | None]:
    """Log-probabilities to four decimals, as they are kept; None for what is not finite, or is beyond what is
    read."""
    return [round(float(value), 4) if abs(value) <= LARGEST_REWARD else None for value in logprobs]


def bounded_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """A prompt's metadata, or how long it was where it is too long to keep or no JSON."""
    try:
        text = json.dumps(metadata, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return {"left_out": "not JSON"}
    if len(text) > MAX_TEXT_CHARACTERS:
        return {"left_out": f"{len(text)} characters"}
    return dict(metadata)
