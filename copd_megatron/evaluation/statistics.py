"""What graded responses say about a model: pure functions, in float64.

Shape legend: ``P`` prompts, ``n`` responses to one prompt, ``B`` bootstrap draws.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

Float64Array = npt.NDArray[np.float64]

LEVEL = 0.95
"""Confidence level of every interval, unless another is asked for."""
_DRAWS = 10_000
_SUBSETS = 2_000
_BLOCK = 2_000_000  # numbers drawn at once


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure with its confidence interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside the interval."""
        return self.low > 0 or self.high < 0


NOTHING = Estimate(value=math.nan, low=math.nan, high=math.nan)
"""The estimate from no data."""


def mean_at_n(rewards: Sequence[Sequence[float]]) -> Float64Array:
    """[P] mean reward of each prompt; NaN where it has no response."""
    return np.asarray([math.fsum(row) / len(row) if len(row) else math.nan for row in rewards], np.float64)


def pass_at_k(num_responses: int, num_right: int, k: int) -> float:
    """The chance that at least one of ``k`` responses drawn from these is right: 1 - C(n - c, k) / C(n, k).

    An unbiased estimate of the same for ``k`` fresh responses.

    Raises:
        ValueError: ``k`` is not between 1 and ``num_responses``, or the counts make no sense.
    """
    if not 0 <= num_right <= num_responses:
        raise ValueError(f"{num_right} right responses of {num_responses}")
    if not 1 <= k <= num_responses:
        raise ValueError(f"pass@{k} of {num_responses} responses: k must be between 1 and their number")
    wrong = num_responses - num_right
    return 1.0 - math.comb(wrong, k) / math.comb(num_responses, k)


def majority_at_k(answers: Sequence[str], rewards: Sequence[float], k: int, *, seed: int = 0) -> float:
    """Expected reward of the answer that most of ``k`` of these responses give (self-consistency).

    The mean over all subsets of ``k`` responses, or over 2,000 drawn ones where there are more. Answers that
    tie count with equal weight. An empty answer is none, and is never the majority: a subset of such has
    reward 0.

    Args:
        answers: final answers, compared as they are.
        rewards: of the same responses.

    Raises:
        ValueError: ``k`` is not between 1 and the number of responses, or the lengths differ.
    """
    if len(answers) != len(rewards):
        raise ValueError(f"{len(answers)} answers and {len(rewards)} rewards")
    if not 1 <= k <= len(answers):
        raise ValueError(f"maj@{k} of {len(answers)} responses: k must be between 1 and their number")
    if math.comb(len(answers), k) <= _SUBSETS:
        subsets: Any = list(combinations(range(len(answers)), k))
    else:
        rng = np.random.default_rng(seed)
        subsets = [rng.choice(len(answers), size=k, replace=False).tolist() for _ in range(_SUBSETS)]
    return math.fsum(_majority_reward(answers, rewards, subset) for subset in subsets) / len(subsets)


def _majority_reward(answers: Sequence[str], rewards: Sequence[float], chosen: Sequence[int]) -> float:
    votes = Counter(answers[i] for i in chosen if answers[i])
    if not votes:
        return 0.0
    most = max(votes.values())
    of_answer: defaultdict[str, list[float]] = defaultdict(list)
    for i in chosen:
        if votes[answers[i]] == most:
            of_answer[answers[i]].append(rewards[i])
    return math.fsum(math.fsum(row) / len(row) for row in of_answer.values()) / len(of_answer)


def wilson(num_right: int, count: int, *, level: float = LEVEL) -> Estimate:
    """A share with Wilson's score interval, for independent responses.

    Raises:
        ValueError: the counts make no sense.
    """
    if not 0 <= num_right <= count:
        raise ValueError(f"{num_right} right responses of {count}")
    if count == 0:
        return NOTHING
    z, share = NormalDist().inv_cdf(0.5 + level / 2), num_right / count
    scale = 1 + z**2 / count
    centre = (share + z**2 / (2 * count)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return Estimate(
        value=share,
        low=0.0 if num_right == 0 else max(0.0, centre - half),
        high=1.0 if num_right == count else min(1.0, centre + half),
    )


def bootstrap(values: npt.ArrayLike, *, level: float = LEVEL, seed: int = 0) -> Estimate:
    """The mean of per-prompt values with a percentile interval over 10,000 draws of prompts.

    Prompts are what is drawn, so that several responses to one prompt do not count as independent.

    Args:
        values: [P]; NaN is left out.
    """
    return mean_of_groups([values], level=level, seed=seed)


def share(values: npt.ArrayLike, *, level: float = LEVEL, seed: int = 0) -> Estimate:
    """The mean of per-prompt shares between 0 and 1, with ``bootstrap``'s interval.

    Where every prompt has share 0, or every prompt 1, draws of prompts are all alike, and an interval of no
    width would claim certainty: then it is Wilson's, over the prompts.

    Args:
        values: [P]; NaN is left out.
    """
    array = np.asarray(values, np.float64)
    known = array[~np.isnan(array)]
    if len(known) and known.min() == known.max() and known[0] in (0.0, 1.0):
        return wilson(int(known.sum()), len(known), level=level)
    return bootstrap(known, level=level, seed=seed)


def mean_of_groups(groups: Sequence[npt.ArrayLike], *, level: float = LEVEL, seed: int = 0) -> Estimate:
    """The plain mean of the groups' means (each group [P_g]), with an interval that draws prompts within each
    group. NaN where a group is empty."""
    arrays = [array[~np.isnan(array)] for array in (np.asarray(group, np.float64) for group in groups)]
    if not arrays or any(len(array) == 0 for array in arrays):
        return NOTHING
    rng = np.random.default_rng(seed)
    draws = np.mean([_draw_means(array, rng) for array in arrays], axis=0)
    low, high = np.quantile(draws, [0.5 - level / 2, 0.5 + level / 2])
    value = math.fsum(math.fsum(array) / len(array) for array in arrays) / len(arrays)
    return Estimate(value=value, low=min(float(low), value), high=max(float(high), value))


def _draw_means(values: Float64Array, rng: np.random.Generator) -> Float64Array:
    """[B] means of as many values, drawn with replacement."""
    rows = max(1, _BLOCK // len(values))
    means = [
        values[rng.integers(len(values), size=(min(rows, _DRAWS - begin), len(values)))].mean(axis=1)
        for begin in range(0, _DRAWS, rows)
    ]
    return np.concatenate(means)


def paired_difference(
    ours: Mapping[str, float], theirs: Mapping[str, float], *, level: float = LEVEL, seed: int = 0
) -> Estimate:
    """Mean of ``ours - theirs`` over the prompts that both have, with a bootstrap interval over prompts.

    Two models answer the same prompts, so what is hard for both cancels out: the interval is narrower than
    that of two independent means.

    Args:
        ours: prompt to mean reward; NaN is left out.
        theirs: the same of the other model.
    """
    both = [prompt for prompt in ours if prompt in theirs]
    return bootstrap([ours[prompt] - theirs[prompt] for prompt in both], level=level, seed=seed)
