"""Sampling and grading outside training: the same grades, given while others are still sampled."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from copd_megatron.config.schema import RewardConfig
from copd_megatron.records import Prompt, Rollout
from copd_megatron.rewards import Grader
from tests.support.rollouts import rollout

HALF = "tests.support.misbehaving_verifiers:half_a_mark"
RESPONSES = [rollout(f"{number}", verifier=HALF, key=str(number)) for number in range(3)]


class Engine:
    """Stands in for vLLM: goes on sampling its last response until the others have their grades."""

    def __init__(self, responses: Sequence[Rollout], tp_rank: int = 0) -> None:
        self.responses, self.tp_rank, self.resets = responses, tp_rank, 0
        self.num_graded_meanwhile = 0
        self.llm = self

    def sample_share(
        self, prompts: Sequence[Prompt], settings: Any, *, listener: Any, **_: Any
    ) -> list[Rollout]:
        *first, last = self.responses
        deadline = time.monotonic() + 300.0
        if listener is not None:
            for response in first:
                listener.add(response)
            while listener._error is None and self.num_graded_meanwhile < len(first):
                assert time.monotonic() < deadline, "nothing is graded while sampling goes on"
                listener.poll()
                self.num_graded_meanwhile = sum(outcome is not None for outcome in listener._run.done)
            listener.add(last)
        return list(self.responses)

    def gather(self, mine: list[Rollout], prompts: Sequence[Prompt], settings: Any) -> list[Rollout]:
        return mine

    def reset_prefix_cache(self) -> None:
        self.resets += 1


def graded(engine: Engine, grader: Grader) -> list[float | None]:
    from copd_megatron.evaluation.sampling import sample_graded

    prompts = [response.prompt for response in engine.responses]
    found = sample_graded(engine, grader, prompts, None, branch="validation/text")  # type: ignore[arg-type]
    assert [r.text for r in found] == [r.text for r in engine.responses] and engine.resets == 1
    return [response.reward for response in found]


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(RewardConfig(verifiers=[HALF], timeout_seconds=20.0, num_workers=1)) as grader:
        yield grader


def test_grading_goes_on_beside_sampling(grader: Grader) -> None:
    engine = Engine(RESPONSES)
    afterwards = [response.reward for response in grader.grade(RESPONSES)]
    assert graded(engine, grader) == afterwards == [0.5] * 3
    assert engine.num_graded_meanwhile == 2


def test_one_rank_of_an_engine_grades(grader: Grader) -> None:
    before = grader.counters()["graded"]
    assert graded(Engine(RESPONSES, tp_rank=1), grader) == [None] * 3
    assert grader.counters()["graded"] == before


def test_an_error_of_grading_is_raised_after_sampling(grader: Grader) -> None:
    unknown = replace(RESPONSES[0], prompt=replace(RESPONSES[0].prompt, verifier="math"))
    with pytest.raises(ValueError, match="names verifier 'math'"):
        graded(Engine([unknown, *RESPONSES]), grader)
