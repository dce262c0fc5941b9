"""What a batch's loss is divided by: global counts of each component, and per-token weights made of them.

numpy only. Shape legend: ``R`` response tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from copd_megatron.config.schema import (
    Aggregation,
    LossConfig,
)
from copd_megatron.objectives.rows import mask_of
from copd_megatron.records import FloatArray, TrainRow


@dataclass(frozen=True, kw_only=True)
class ComponentCounts:
    """How much of one component there is; ``+`` joins the counts of ranks or micro-batches."""

    num_sequences: int = 0
    """Rows with at least one unmasked token."""
    num_tokens: int = 0
    """Unmasked tokens."""

    def __add__(self, other: ComponentCounts) -> ComponentCounts:
        return ComponentCounts(
            num_sequences=self.num_sequences + other.num_sequences,
            num_tokens=self.num_tokens + other.num_tokens,
        )


def component_counts(rows: Iterable[TrainRow]) -> dict[str, ComponentCounts]:
    """Counts of each component among ``rows``. Add them up over data-parallel ranks before use."""
    counts: dict[str, ComponentCounts] = {}
    for row in rows:
        tokens = int(mask_of(row.loss_mask).sum())
        here = ComponentCounts(num_sequences=int(tokens > 0), num_tokens=tokens)
        counts[row.component] = counts.get(row.component, ComponentCounts()) + here
    return counts


def token_weights(
    aggregation: Aggregation,
    response_masks: Sequence[npt.ArrayLike],
    num_sequences: int,
    num_tokens: int,
    constant_divisor: float | None = None,
) -> list[FloatArray]:
    """Per-token weights whose weighted sum of token losses is the aggregated loss of one component.

    With m_t the mask, |y| the row's unmasked tokens, and the component's *global* counts S (sequences with
    an unmasked token) and T (unmasked tokens):

    * ``seq_mean_token_mean`` (Eq. 7): m_t / (S |y|); sums to 1 over the component
    * ``token_mean``: m_t / T; sums to 1 over the component
    * ``seq_mean_token_sum``: m_t / S
    * ``constant`` (Dr. GRPO): m_t / (S * constant_divisor)

    Args:
        response_masks: one [R] loss mask of 0 and 1 per row; rows of this rank or micro-batch only.
        num_sequences: S, over all ranks.
        num_tokens: T, over all ranks.
        constant_divisor: for ``constant``.

    Returns:
        One [R] array per row, all zeros where the row is masked as a whole.

    Raises:
        ValueError: a mask holds something else than 0 and 1, the counts are smaller than what the rows
            hold, or ``constant`` lacks a positive divisor.
    """
    masks = [mask_of(mask) for mask in response_masks]
    lengths = [int(mask.sum()) for mask in masks]
    here = (sum(length > 0 for length in lengths), sum(lengths))
    if here[0] > num_sequences or here[1] > num_tokens:
        raise ValueError(
            f"the rows hold {here[0]} sequences and {here[1]} tokens, the global counts say {num_sequences} "
            f"and {num_tokens}: pass counts summed over all ranks (component_counts)"
        )
    if aggregation is Aggregation.constant and (constant_divisor is None or not constant_divisor > 0):
        raise ValueError(
            f"loss.aggregation 'constant' needs a positive constant_divisor, got {constant_divisor}"
        )

    def weight(length: int) -> float:
        if aggregation is Aggregation.seq_mean_token_mean:
            return 1.0 / (num_sequences * length)
        if aggregation is Aggregation.token_mean:
            return 1.0 / num_tokens
        if aggregation is Aggregation.seq_mean_token_sum:
            return 1.0 / num_sequences
        assert constant_divisor is not None
        return 1.0 / (num_sequences * constant_divisor)

    return [
        (mask * (weight(length) if length else 0.0)).astype(np.float32)
        for mask, length in zip(masks, lengths, strict=True)
    ]


def row_weights(
    rows: Sequence[TrainRow],
    counts: Mapping[str, ComponentCounts],
    config: LossConfig,
    max_new_tokens: int,
) -> list[FloatArray]:
    """``token_weights`` for rows of mixed components: each is normalised by its own global counts and then
    multiplied by the row's ``component_weight``. These are ``losses.TokenStreams.weights``.

    Args:
        rows: rows of this rank or micro-batch.
        counts: global counts of every component among ``rows``.
        max_new_tokens: the divisor of ``constant`` where ``constant_divisor`` is null.

    Returns:
        One [R] array per row.

    Raises:
        ValueError: as ``token_weights``, or a component is missing from ``counts``.
    """
    divisor = float(max_new_tokens) if config.constant_divisor is None else config.constant_divisor
    weights: list[FloatArray] = [np.zeros(0, dtype=np.float32)] * len(rows)
    for component in dict.fromkeys(row.component for row in rows):
        if component not in counts:
            raise ValueError(f"no counts for component {component!r}, only for {sorted(counts)}")
        indices = [index for index, row in enumerate(rows) if row.component == component]
        total = counts[component]
        masks = [rows[index].loss_mask for index in indices]
        per_row = token_weights(config.aggregation, masks, total.num_sequences, total.num_tokens, divisor)
        for index, values in zip(indices, per_row, strict=True):
            weights[index] = (values * rows[index].component_weight).astype(np.float32)
    return weights
