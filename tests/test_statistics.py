"""Statistics of evaluations against references that share no code with them: enumeration, published
intervals, the normal limit."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest

from copd_megatron.evaluation.statistics import (
    bootstrap,
    majority_at_k,
    mean_at_n,
    mean_of_groups,
    paired_difference,
    pass_at_k,
    share,
    wilson,
)


def test_mean_at_n() -> None:
    assert mean_at_n([[1.0, 0.0], [0.25], [0.1] * 10]).tolist() == [0.5, 0.25, 0.1]
    assert math.isnan(mean_at_n([[]])[0])


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(n: int) -> None:
    for right in range(n + 1):
        for k in range(1, n + 1):
            subsets = list(combinations([True] * right + [False] * (n - right), k))
            share = Fraction(sum(any(subset) for subset in subsets), len(subsets))
            assert pass_at_k(n, right, k) == pytest.approx(float(share), abs=1e-15)


def test_pass_at_k_is_unbiased() -> None:
    """The expectation over n responses that are each right with probability p is 1 - (1 - p)^k."""
    n, k, p = 7, 3, 0.3
    mean = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
    assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


@pytest.mark.parametrize("arguments", [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_refuses_what_makes_no_sense(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="responses"):
        pass_at_k(*arguments)


def test_majority_at_k_against_enumeration() -> None:
    answers, rewards = ["4", "4", "5", "", "6", "4"], [1.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    for k in range(1, 7):
        total = 0.0
        subsets = list(combinations(zip(answers, rewards, strict=True), k))
        for subset in subsets:
            votes = Counter(answer for answer, _ in subset if answer).most_common()
            best = [answer for answer, count in votes if count == votes[0][1]]
            total += sum(dict(subset)[answer] for answer in best) / len(best) if best else 0.0
        assert majority_at_k(answers, rewards, k) == pytest.approx(total / len(subsets), abs=1e-12)
    assert majority_at_k(answers, rewards, 6) == 1.0
    assert majority_at_k(["", ""], [0.0, 0.0], 2) == 0.0


def test_majority_of_many_draws_subsets_by_seed() -> None:
    answers = ["a"] * 20 + ["b"] * 12
    rewards = [1.0] * 20 + [0.0] * 12
    exact = sum(math.comb(20, a) * math.comb(12, 9 - a) / math.comb(32, 9) * (a > 9 - a) for a in range(10))
    assert majority_at_k(answers, rewards, 9) == pytest.approx(exact, abs=0.03)
    assert majority_at_k(answers, rewards, 9) == majority_at_k(answers, rewards, 9)


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [  # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_against_published_intervals(right: int, count: int, low: float, high: float) -> None:
    found = wilson(right, count)
    assert (round(found.low, 4), round(found.high, 4)) == (low, high)
    assert found.value == right / count
    mirrored = wilson(count - right, count)
    assert mirrored.low == pytest.approx(1 - found.high) and mirrored.high == pytest.approx(1 - found.low)


def test_wilsons_bounds_solve_its_equation() -> None:
    """|share - p| = z * sqrt(p (1 - p) / n) at both ends."""
    z = 1.6448536269514722  # 90 %
    found = wilson(37, 90, level=0.9)
    for p in (found.low, found.high):
        assert abs(37 / 90 - p) == pytest.approx(z * math.sqrt(p * (1 - p) / 90), abs=1e-12)


def test_bootstrap_has_the_normal_limit_and_is_seeded() -> None:
    values = np.random.default_rng(5).normal(2.0, 3.0, 4000)
    found = bootstrap(values)
    error = values.std(ddof=1) / math.sqrt(len(values))
    assert found.value == pytest.approx(values.mean(), abs=1e-12)
    assert found.low == pytest.approx(values.mean() - 1.959964 * error, abs=0.1 * error)
    assert found.high == pytest.approx(values.mean() + 1.959964 * error, abs=0.1 * error)
    assert bootstrap(values) == found
    assert bootstrap([0.5] * 9) == bootstrap([0.5])


def test_bootstrap_against_all_draws_of_three_prompts() -> None:
    values = [0.0, 0.0, 1.0]
    means = sorted(sum(draw) / 3 for draw in _all_draws(values))
    found = bootstrap(values, level=0.5)
    assert found.low == means[round(0.25 * 26)] and found.high == pytest.approx(means[round(0.75 * 26)])


def _all_draws(values: list[float]) -> list[tuple[float, float, float]]:
    return [(a, b, c) for a in values for b in values for c in values]


def test_intervals_cover_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    hits = [_covers(rng.random(60) < 0.3, 0.3) for _ in range(120)]
    assert 0.88 <= np.mean(hits) <= 0.99


def _covers(sample: np.ndarray, truth: float) -> bool:
    found = bootstrap(sample.astype(float))
    return found.low <= truth <= found.high


def test_the_mean_of_groups_weighs_groups_alike() -> None:
    found = mean_of_groups([[1.0] * 100, [0.0, 1.0]])
    assert found.value == 0.75 and found.low == 0.5 and found.high == 1.0
    assert math.isnan(mean_of_groups([[1.0], []]).value) and math.isnan(mean_of_groups([]).value)


def test_a_paired_difference_is_narrower_than_two_means() -> None:
    rng = np.random.default_rng(1)
    hard = rng.random(300)
    theirs = {str(i): float(value) for i, value in enumerate(hard)}
    ours = {str(i): float(value) + 0.05 + rng.normal(0, 0.02) for i, value in enumerate(hard)}
    found = paired_difference(ours | {"another": 5.0}, theirs)
    assert found.value == pytest.approx(0.05, abs=0.01) and found.excludes_zero
    assert found.high - found.low < 0.01 < bootstrap(hard).high - bootstrap(hard).low
    assert not paired_difference(theirs, theirs).excludes_zero


@pytest.mark.parametrize("all_right", [True, False])
def test_a_set_that_is_all_right_or_all_wrong_claims_no_certainty(all_right: bool) -> None:
    found = share([float(all_right)] * 20)
    assert found == wilson(20 * all_right, 20) and found.high - found.low > 0.1
    assert share([1.0, 0.5, math.nan]) == bootstrap([1.0, 0.5])
    assert math.isnan(share([math.nan]).value)
