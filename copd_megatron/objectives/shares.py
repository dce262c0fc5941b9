"""How much of an update each component of the loss has a say in. numpy only.

Multi-teacher distillation can fail by an imbalanced gradient budget: a domain with a fifth of the prompts had
0.9 % of the gradient (Open-MOPD, arXiv 2608.19098). What is counted here is sum_t weight_t * |A_t| over a
component's tokens, ``weight`` being the factor of the token's loss (mask, aggregation, component weight).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from copd_megatron.config.schema import Balance, LossConfig
from copd_megatron.objectives.denominators import component_counts, row_weights
from copd_megatron.records import TrainRow


def advantage_shares(rows: Sequence[TrainRow], loss: LossConfig, max_new_tokens: int) -> dict[str, float]:
    """Each component's share of sum weight * |advantage| over all rows of an update.

    Args:
        rows: of all ranks.
        loss: for the aggregation.
        max_new_tokens: the divisor of ``aggregation=constant`` where ``constant_divisor`` is null.

    Returns:
        Component to its share; the shares sum to 1, or are all 0 where no row has an advantage.
    """
    sums = _sizes(rows, loss, max_new_tokens)
    total = sum(sums.values())
    return {component: size / total if total else 0.0 for component, size in sums.items()}


FACTOR_BOUNDS: Final = (0.05, 20.0)
"""Open-MOPD's bounds on the factor of a component's weight."""


def balance_factors(
    rows: Sequence[TrainRow], loss: LossConfig, max_new_tokens: int, first_sizes: Mapping[str, float]
) -> dict[str, float]:
    """Factor on the weight of every component of an update, as ``loss.balance`` wants it.

    Every component is normalised by its own counts, which is Open-MOPD's first mend (weights by token share)
    with the components' weights as its targets. This is about the size of advantages.

    Args:
        rows: of all ranks.
        first_sizes: mean |advantage| of each component at its first step (``mean_sizes``); for ``drift``.

    Returns:
        Component to factor, within ``FACTOR_BOUNDS``; 1 where a component has no advantages, or no past.
    """
    if loss.balance is Balance.drift:
        now = mean_sizes(rows)
        return {
            component: _bounded((size / first) ** loss.balance_exponent if size and first else 1.0)
            for component, size in now.items()
            for first in [first_sizes.get(component, 0.0)]
        }
    sizes = _sizes(rows, loss, max_new_tokens)
    weights = {row.component: row.component_weight for row in rows}
    present = [component for component, size in sizes.items() if size > 0]
    total, of_weights = sum(sizes.values()), sum(weights[component] for component in present)
    return {
        component: _bounded(weights[component] / of_weights * total / size) if size > 0 else 1.0
        for component, size in sizes.items()
    }


def mean_sizes(rows: Sequence[TrainRow]) -> dict[str, float]:
    """Mean |advantage| over the unmasked tokens of each component."""
    sums: dict[str, float] = {}
    counts: dict[str, float] = {}
    for row in rows:
        keep = row.loss_mask > 0
        size = float(np.abs(row.advantages[keep].astype(np.float64)).sum())
        sums[row.component] = sums.get(row.component, 0.0) + size
        counts[row.component] = counts.get(row.component, 0.0) + float(keep.sum())
    return {component: sums[component] / max(counts[component], 1.0) for component in sums}


def _sizes(rows: Sequence[TrainRow], loss: LossConfig, max_new_tokens: int) -> dict[str, float]:
    """Sum of weight * |advantage| of every component."""
    weights = row_weights(rows, component_counts(rows), loss, max_new_tokens)
    sums: dict[str, float] = {}
    for row, weight in zip(rows, weights, strict=True):
        size = float(np.abs(row.advantages.astype(np.float64) * weight).sum())
        sums[row.component] = sums.get(row.component, 0.0) + size
    return sums


def _bounded(factor: float) -> float:
    return min(max(factor, FACTOR_BOUNDS[0]), FACTOR_BOUNDS[1])
