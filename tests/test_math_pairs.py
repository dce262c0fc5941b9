"""The math verifier on hard pairs: equivalent forms, near misses, hedges, cut responses."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator

import pytest

from copd_megatron.rewards import registry
from copd_megatron.rewards.mathematics.compare import Comparison, TooMuchWorkError
from copd_megatron.rewards.mathematics.shapes import read
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


def a_set(items: Iterable[str]) -> str:
    return rf"\{{{', '.join(items)}\}}"


def nested(depth: int, width: int, leaves: Iterator[str]) -> str:
    return a_set(nested(depth - 1, width, leaves) for _ in range(width)) if depth else next(leaves)


MANY = range(60)
LARGE_SETS = {
    "formulas": ([rf"\sin({i}x)+{i}" for i in MANY], [rf"{i}+\sin(x\cdot {i})" for i in MANY]),
    "roots": ([rf"\sqrt{{{i + 2}}}" for i in MANY], [rf"\frac{{\sqrt{{{4 * i + 8}}}}}{{2}}" for i in MANY]),
    "equations": (
        [rf"x^2+{i + 2}y={i + 1}" for i in MANY],
        [rf"2x^2+{2 * i + 4}y={2 * i + 2}" for i in MANY],
    ),
    "units": (
        [rf"\sqrt{{{i + 2}}} \text{{ km}}" for i in MANY],
        [rf"1000\sqrt{{{i + 2}}} \text{{ m}}" for i in MANY],
    ),
    "percentages": (
        [rf"\sqrt{{{i + 2}}}\%" for i in MANY],
        [rf"\frac{{\sqrt{{{i + 2}}}}}{{100}}" for i in MANY],
    ),
    "angles": (
        [rf"\sqrt{{{i + 2}}}^\circ" for i in MANY],
        [rf"\frac{{\sqrt{{{i + 2}}}\pi}}{{180}}" for i in MANY],
    ),
    "chains": (
        [rf"\sqrt{{{i + 2}}}" for i in MANY],
        [rf"\sqrt{{{i + 2}}}=\sqrt{{{i + 1}+1}}=\sqrt{{{i}+2}}" for i in MANY],
    ),
    "approximations": (
        [rf"\sqrt{{{i + 2}}}" for i in MANY],
        [rf"\sqrt{{{i + 2}}}\approx {(i + 2) ** 0.5:.3f}" for i in MANY],
    ),
    "tuples": ([rf"(\sqrt{{{i + 2}}},x+{i})" for i in MANY], [rf"(\sqrt{{{i + 2}}},{i}+x)" for i in MANY]),
    "intervals": ([rf"[{i},\sqrt{{{i * i + 2}}}]" for i in MANY],) * 2,
    "seven symbols": (
        [f"a+b+c+d+f+g+h+{i}" for i in MANY],
        [f"{i}+a+b+c+d+f+g+h" for i in MANY],
    ),
    "sums": (
        [rf"\sum_{{k=1}}^{{{i + 5}}} k^2" for i in range(40)],
        [rf"\sum_{{k=1}}^{{{i + 5}}} k\cdot k" for i in range(40)],
    ),
}


@pytest.mark.parametrize("kind", LARGE_SETS)
def test_large_sets_are_compared_in_time(kind: str) -> None:
    """All pairs are compared, and each text is parsed and evaluated once. The order is of no account, and one
    item that differs is found."""
    gold, found = LARGE_SETS[kind]
    backwards = found[::-1]
    for response, right in ((backwards, True), ([*backwards[:-1], "7x+13579"], False)):
        begin = time.process_time()
        value = registry.get("math").verify(rf"\boxed{{{a_set(response)}}}", a_set(gold), {})
        assert time.process_time() - begin < 8.0
        assert value == float(right)


@pytest.mark.parametrize(("depth", "width"), [(6, 2), (4, 3), (3, 5), (2, 16), (7, 2), (20, 1)])
@pytest.mark.parametrize("gold", ["same", r"\{1,2\}"])
def test_sets_of_sets_end(gold: str, depth: int, width: int) -> None:
    """Every level compares all pairs of its own, with all pairs of the level below: without a bound, the work
    grows with a power of the depth."""
    leaves = (rf"\sqrt{{{i}}}" for i in itertools.count(2))
    known = nested(depth, width, leaves) if gold == "same" else gold
    others = (rf"\sqrt{{{i}}}+1" for i in itertools.count(2))
    found = nested(depth, width, others)
    begin = time.process_time()
    value = registry.get("math").verify(rf"\boxed{{{found}}}", known, {})
    assert time.process_time() - begin < 8.0 and value == 0.0


def test_the_bound_of_work_is_a_count_and_no_clock() -> None:
    gold, found = (read(a_set(str(i + shift) for i in range(60))) for shift in (0, 60))
    comparison = Comparison(6)
    with pytest.raises(TooMuchWorkError):
        for _ in range(100):
            assert not comparison.same(gold, found)
    assert Comparison(6).same(gold, gold) and not Comparison(6).same(gold, found)


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
