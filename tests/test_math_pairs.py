"""The math verifier on hard pairs: equivalent forms, near misses, hedges, cut responses."""

from __future__ import annotations

import time

import pytest

from copd_megatron.rewards import registry
from tests.support.math_pairs import Pair, math_pairs

PAIRS = math_pairs()


def test_there_are_enough_pairs_and_half_are_wrong() -> None:
    num_right = sum(pair.is_right for pair in PAIRS)
    assert len(PAIRS) >= 300 and 0.4 < num_right / len(PAIRS) < 0.6


@pytest.mark.parametrize("kind", sorted({pair.kind for pair in PAIRS}))
def test_verdicts(kind: str) -> None:
    wrong = [pair for pair in PAIRS if pair.kind == kind and verdict(pair) != pair.is_right]
    assert not wrong


def verdict(pair: Pair) -> bool:
    begin = time.monotonic()
    value = registry.get("math").verify(pair.response, pair.gold, {})
    assert time.monotonic() - begin < 10.0
    return value == 1.0


def test_a_formula_that_repeats_the_question_is_refused() -> None:
    verify = registry.get("math").verify
    question = {"question": "Expand $(x+1)^2$."}
    assert verify(r"\boxed{(x+1)^2}", "x^2+2x+1", question) == 0.0
    assert verify(r"\boxed{x^2+2x+1}", "x^2+2x+1", question) == 1.0
    assert verify(r"\boxed{(x+1)^2}", "x^2+2x+1", {}) == 1.0
