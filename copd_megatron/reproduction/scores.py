"""From rewards of single prompts to figures with intervals, over seeds and prompts.

A seed is another world, another base and another run, so seeds are what a claim has to hold over. An interval
is the wider one of two: Student's t over the seeds' means, and a bootstrap that draws seeds and, within each,
prompts. With few seeds a bootstrap alone is too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from copd_megatron.errors import DataError
from copd_megatron.evaluation.statistics import Estimate, mean_at_n
from copd_megatron.untrusted.json_text import load_file

MEAN = "mean"
"""Label of the plain mean over domains."""
Float64Array = npt.NDArray[np.float64]
DomainValues = Mapping[str, Float64Array]
"""Domain to [P] mean reward of each prompt, in one order for all models of a seed."""
_DRAWS = 10_000
_T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""The 97.5 % quantile of Student's t with 1, 2, ... degrees of freedom."""


def read_scores(folder: Path, label: str) -> DomainValues:
    """A model's rewards, as ``measure.py`` wrote them.

    Raises:
        FileNotFoundError: it was not measured.
        DataError: the file holds something else.
    """
    path = folder / f"{label}.json"
    try:
        found = load_file(path)["domains"]
        return {
            domain: mean_at_n([prompts[key] for key in sorted(prompts)]) for domain, prompts in found.items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not scores ({error!r}). Remove it and measure again.") from error


def macro(values: DomainValues, domain: str = MEAN) -> float:
    """Mean reward on one domain, or the plain mean over domains."""
    chosen = list(values) if domain == MEAN else [domain]
    return float(np.mean([values[name].mean() for name in chosen]))


def estimate(seeds: Sequence[DomainValues], domain: str = MEAN) -> Estimate:
    """The mean over seeds, with its interval.

    Args:
        seeds: one element per seed.
        domain: one domain, or ``MEAN``.
    """
    chosen = [[values[name] for name in (values if domain == MEAN else [domain])] for values in seeds]
    return over_seeds([np.mean([array.mean() for array in arrays]) for arrays in chosen], chosen)


def difference(
    ours: Mapping[int, DomainValues], theirs: Mapping[int, DomainValues], domain: str = MEAN
) -> Estimate:
    """Mean of ours minus theirs over the seeds that both have, prompt by prompt."""
    pairs = [
        {name: ours[seed][name] - theirs[seed][name] for name in ours[seed]}
        for seed in sorted(set(ours) & set(theirs))
    ]
    return estimate(pairs, domain)


def over_seeds(means: Sequence[float], arrays: Sequence[Sequence[Float64Array]] | None = None) -> Estimate:
    """The mean of the seeds' figures, with the wider of the two intervals. One seed has an interval over its
    prompts alone, or none.

    Args:
        means: one figure per seed.
        arrays: what each figure is the mean of the means of; None: only seeds are drawn.
    """
    if not means:
        return Estimate(value=math.nan, low=math.nan, high=math.nan)
    count, value = len(means), float(np.mean(means))
    if count == 1:
        if arrays is None:
            return Estimate(value=value, low=-math.inf, high=math.inf)
        return _interval(_drawn(arrays[0]), value)
    rng = np.random.default_rng(0)
    per_seed = (
        np.stack([_drawn(groups, seed) for seed, groups in enumerate(arrays)])
        if arrays is not None
        else np.repeat(np.asarray(means, np.float64)[:, None], _DRAWS, axis=1)
    )
    chosen = rng.integers(count, size=(count, _DRAWS))
    drawn = _interval(per_seed[chosen, np.arange(_DRAWS)].mean(axis=0), value)
    half = _T_975[min(count - 2, len(_T_975) - 1)] * float(np.std(means, ddof=1)) / math.sqrt(count)
    return Estimate(value=value, low=min(drawn.low, value - half), high=max(drawn.high, value + half))


def _drawn(arrays: Sequence[Float64Array], seed: int = 0) -> Float64Array:
    """[draws] means over the domains, prompts drawn with replacement."""
    means = []
    for place, array in enumerate(arrays):
        counts = _counts(len(array), seed, place)
        means.append(counts.astype(np.float64) @ array / len(array))
    found: Float64Array = np.mean(means, axis=0)
    return found


@cache
def _counts(num_prompts: int, seed: int, place: int) -> npt.NDArray[np.uint16]:
    """[draws, prompts]: how often each prompt of a domain is drawn. All figures share these draws."""
    rng = np.random.default_rng((seed, place))
    chosen = rng.integers(num_prompts, size=(_DRAWS, num_prompts))
    chosen += np.arange(_DRAWS)[:, None] * num_prompts
    counted = np.bincount(chosen.ravel(), minlength=_DRAWS * num_prompts)
    return counted.reshape(_DRAWS, num_prompts).astype(np.uint16)


def _interval(draws: Float64Array, value: float) -> Estimate:
    low, high = np.quantile(draws, [0.025, 0.975])
    return Estimate(value=value, low=min(float(low), value), high=max(float(high), value))
