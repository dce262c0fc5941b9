"""Grades recorded responses again, and compares with what was said of them before."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np

from copd_megatron.config.schema import RewardConfig
from copd_megatron.records import Prompt, Rollout
from copd_megatron.rewards import registry
from copd_megatron.rewards.grader import Grader
from copd_megatron.rewards.terms import OWN, WEIGHTED, read_terms


class Grade(Enum):
    """A reward in a word."""

    right = "right"
    """1 or more."""
    partial = "partial"
    """Between 0 and 1."""
    wrong = "wrong"
    """0 or less."""
    failed = "failed"
    """The verifier raised, hung or died."""
    unknown = "unknown"
    """Nobody said anything."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A response to grade."""

    name: str
    prompt: str
    response: str
    answer: str
    verifier: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    label: float | None = None
    """What is known of it: a recorded reward, or a person's verdict (1 right, 0 wrong)."""
    terms: Mapping[str, float] = field(default_factory=dict)
    """Weights of what the reward consists of, as a branch's ``reward.terms``; empty: the verifier alone."""
    truncated: bool = False
    opens_thinking: bool = False


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the verifier says of a case now."""

    case: Case
    reward: float
    failed: bool
    seconds: float
    """Wall-clock time, with the process that a response is graded in."""

    @property
    def grade(self) -> Grade:
        """The reward in a word."""
        return Grade.failed if self.failed else grade_of(self.reward)

    @property
    def disagrees(self) -> bool:
        """Whether the label says otherwise."""
        label = self.case.label
        return label is not None and (self.failed or abs(label - self.reward) > 1e-6)


@dataclass(frozen=True)
class Audit:
    """All verdicts, in the order of the cases."""

    verdicts: Sequence[Verdict]

    @property
    def table(self) -> Counter[tuple[Grade, Grade]]:
        """Cases by label and verdict."""
        return Counter((grade_of(one.case.label), one.grade) for one in self.verdicts)

    @property
    def disagreements(self) -> list[Verdict]:
        """Cases whose label says otherwise."""
        return [one for one in self.verdicts if one.disagrees]

    def milliseconds(self, percent: int) -> float:
        """The time per verdict that so many percent of the cases stay within; 0 without cases."""
        times = [1000.0 * one.seconds for one in self.verdicts]
        return (
            statistics.quantiles(times, n=100, method="inclusive")[percent - 1]
            if len(times) > 1
            else sum(times)
        )


def grade_of(reward: float | None) -> Grade:
    """A reward, or None, in a word."""
    if reward is None:
        return Grade.unknown
    if reward >= 1.0:
        return Grade.right
    return Grade.partial if reward > 0.0 else Grade.wrong


def audit(cases: Sequence[Case], *, timeout_seconds: float = 10.0, trusted: Collection[str] = ()) -> Audit:
    """Grades every case as a run would, one after the other.

    Args:
        trusted: verifiers that cases may name by path (``registry.named_by_data``).

    Raises UnknownVerifierError, ConfigError where a verifier cannot run here, ValueError for bad terms.
    """
    verifiers = _names(cases)
    for verifier in verifiers:
        registry.named_by_data(verifier, trusted)
    config = RewardConfig(verifiers=verifiers, timeout_seconds=timeout_seconds)
    with Grader(config) as grader:
        for name in {case.verifier: case for case in cases}.values():
            grader.grade([_rollout(name)], name.terms)  # what is loaded once is not timed
        return Audit([_verdict(grader, case) for case in cases])


def _names(cases: Iterable[Case]) -> list[str]:
    names: dict[str, None] = {}
    for case in cases:
        names |= dict.fromkeys([case.verifier, *(name for name in case.terms if name != OWN)])
        if case.verifier == WEIGHTED:
            names.update(dict.fromkeys(term.verifier for term in read_terms(case.metadata)))
    return list(names)


def _verdict(grader: Grader, case: Case) -> Verdict:
    failures, begin = grader.counters()["failed"], time.perf_counter()
    (graded,) = grader.grade([_rollout(case)], case.terms)
    seconds = time.perf_counter() - begin
    failed = grader.counters()["failed"] > failures
    return Verdict(case=case, reward=graded.reward or 0.0, failed=failed, seconds=seconds)


def _rollout(case: Case) -> Rollout:
    prompt = Prompt(
        prompt_id=case.name,
        domain="audit",
        token_ids=np.zeros(1, np.int32),
        answer=case.answer,
        verifier=case.verifier,
        metadata=case.metadata,
        opens_thinking=case.opens_thinking,
    )
    return Rollout(
        prompt=prompt,
        sample_index=0,
        token_ids=np.zeros(2, np.int32),
        rollout_logprobs=np.zeros(1, np.float32),
        text=case.response,
        truncated=case.truncated,
        weight_version=0,
        seed=0,
    )
