"""How much of an update each component of the loss has a say in. numpy only.

Multi-teacher distillation can fail by an imbalanced gradient budget: a domain with a fifth of the prompts had
0.9 % of the gradient (Open-MOPD, arXiv 2608.19098). What is counted here is sum_t weight_t * |A_t| over a
component's tokens, ``weight`` being the factor of the token's loss (mask, aggregation, component weight).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from copd_megatron.config.schema import LossConfig
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
    weights = row_weights(rows, component_counts(rows), loss, max_new_tokens)
    sums: dict[str, float] = {}
    for row, weight in zip(rows, weights, strict=True):
        size = float(np.abs(row.advantages.astype(np.float64) * weight).sum())
        sums[row.component] = sums.get(row.component, 0.0) + size
    total = sum(sums.values())
    return {component: size / total if total else 0.0 for component, size in sums.items()}
