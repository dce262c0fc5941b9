"""The math verifier on hard pairs: equivalent forms, near misses, hedges, cut responses."""

from __future__ import annotations

import time

import pytest

from copd_megatron.rewards import registry
from tests.support.math_pairs import FILES, Pair, math_pairs

PAIRS = math_pairs()
INDEPENDENT = math_pairs(FILES[1])


def test_there_are_enough_pairs_and_half_are_wrong() -> None:
    num_right = sum(pair.is_right for pair in PAIRS)
    assert len(PAIRS) >= 300 and 0.4 < num_right / len(PAIRS) < 0.6


@pytest.mark.parametrize("kind", sorted({pair.kind for pair in PAIRS}))
def test_verdicts(kind: str) -> None:
    wrong = [pair for pair in PAIRS if pair.kind == kind and verdict(pair) != pair.is_right]
    assert not wrong


def test_there_are_independent_pairs_and_half_are_wrong() -> None:
    num_right = sum(pair.is_right for pair in INDEPENDENT)
    assert len(INDEPENDENT) >= 120 and 0.4 < num_right / len(INDEPENDENT) < 0.6


@pytest.mark.parametrize("kind", sorted({pair.kind for pair in INDEPENDENT}))
def test_verdicts_on_independent_pairs(kind: str) -> None:
    wrong = [pair for pair in INDEPENDENT if pair.kind == kind and verdict(pair) != pair.is_right]
    assert not wrong


@pytest.mark.parametrize(
    ("response", "gold", "right"),
    [
        (r"\boxed{(y,x)=(-1,2)}", "(2,-1)", True),
        (r"\boxed{(y,x)=(2,-1)}", "(2,-1)", False),
        (r"\boxed{(a,b)=(1,2,3)}", "(1,2,3)", False),
        (r"\boxed{|x|>2}", r"(-\infty,-2)\cup(2,\infty)", True),
        (r"\boxed{|x|\ge 2}", r"(-\infty,-2)\cup(2,\infty)", False),
        (r"\boxed{|x|<-2}", "(2,-2)", False),
        ("The answer is *17*.", "17", True),
        ("The answer is **5**!", "120", False),
        ("The answer is **18**.", "17", False),
    ],
)
def test_names_of_a_tuple_absolute_values_and_bold_type(response: str, gold: str, right: bool) -> None:
    assert verdict(Pair(gold, response, right, "")) is right


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
