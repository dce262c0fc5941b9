"""How long prompts and responses are: a mean, a tail and a limit. Pure.

Lengths follow a log-normal distribution whose 99th percentile is given, cut at the limit:

    p99 / mean = exp(2.326 s - s^2 / 2),    length(q) = min(limit, mean exp(s z(q) - s^2 / 2))
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

_Z99 = NormalDist().inv_cdf(0.99)
_LARGEST_RATIO = math.exp(_Z99**2 / 2)
"""Of the 99th percentile to the mean, that a log-normal distribution can have: about 15."""
_POINTS = 256


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Tokens of prompts, or of responses."""

    mean: float
    """Before the limit cuts."""
    p99: float
    limit: float

    def quantiles(self, count: int) -> tuple[float, ...]:
        """``count`` lengths that stand for the distribution, ascending."""
        return _quantiles(self, count)

    @property
    def average(self) -> float:
        """Mean length, after the limit has cut."""
        return math.fsum(self.quantiles(_POINTS)) / _POINTS

    @property
    def square(self) -> float:
        """Mean of the squared length."""
        return math.fsum(x * x for x in self.quantiles(_POINTS)) / _POINTS


@cache
def _quantiles(lengths: Lengths, count: int) -> tuple[float, ...]:
    ratio = min(max(lengths.p99 / lengths.mean, 1.0), _LARGEST_RATIO)
    spread = _Z99 - math.sqrt(max(_Z99**2 - 2 * math.log(ratio), 0.0))
    normal = NormalDist()
    return tuple(
        min(
            lengths.limit,
            max(1.0, lengths.mean * math.exp(spread * normal.inv_cdf((i + 0.5) / count) - spread**2 / 2)),
        )
        for i in range(count)
    )


def parse_lengths(text: str, limit: float) -> Lengths:
    """``2000`` or ``2000:16000`` (mean, and 99th percentile).

    Raises:
        ValueError: neither, or a length that is not above 0 or is above the limit.
    """
    mean, _, tail = text.partition(":")
    try:
        found = Lengths(mean=float(mean), p99=float(tail or mean), limit=limit)
    except ValueError:
        raise ValueError(
            f"{text!r} is no length; write 2000, or 2000:16000 for mean and 99th percentile"
        ) from None
    if not 0 < found.mean <= limit or not found.p99 >= found.mean:
        raise ValueError(
            f"{text!r}: the mean has to lie above 0 and within the limit of {limit:g} tokens that the "
            "configuration sets, and the 99th percentile not below it"
        )
    return found
