"""``objectives.denominators``: token weights from the global counts of each component."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from copd_megatron.config.schema import Aggregation, LossConfig
from copd_megatron.objectives.denominators import (
    ComponentCounts,
    component_counts,
    row_weights,
    token_weights,
)
from tests.support.rows import MAX_NEW_TOKENS, make_row

masks_strategy = st.lists(st.lists(st.integers(0, 1), max_size=6), min_size=1, max_size=6)


@given(masks=masks_strategy, aggregation=st.sampled_from(Aggregation))
def test_token_weights_equal_the_formulas(masks: list[list[int]], aggregation: Aggregation) -> None:
    sequences, tokens = sum(any(mask) for mask in masks), sum(map(sum, masks))
    result = token_weights(aggregation, masks, sequences, tokens, 16.0)
    for mask, weights in zip(masks, result, strict=True):
        assert weights.dtype == np.float32
        for m, weight in zip(mask, weights, strict=True):
            expected = 0.0
            if m:
                expected = {
                    Aggregation.seq_mean_token_mean: lambda length: 1 / (sequences * length),
                    Aggregation.token_mean: lambda _: 1 / tokens,
                    Aggregation.seq_mean_token_sum: lambda _: 1 / sequences,
                    Aggregation.constant: lambda _: 1 / (sequences * 16.0),
                }[aggregation](sum(mask))
            assert weight == pytest.approx(expected, rel=1e-6)
    if tokens and aggregation in (Aggregation.seq_mean_token_mean, Aggregation.token_mean):
        assert sum(float(weights.sum()) for weights in result) == pytest.approx(1.0, rel=1e-5)


@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from(["native", "cross:image", "cross:video"]), st.lists(st.integers(0, 1), max_size=5)
        ),
        max_size=10,
    ),
    cut=st.integers(0, 10),
    aggregation=st.sampled_from(Aggregation),
)
def test_components_are_normalised_by_their_own_global_counts(
    rows: list[tuple[str, list[int]]], cut: int, aggregation: Aggregation
) -> None:
    """Weights do not depend on how rows are dealt to ranks, nor on what other components are there."""
    all_rows = [make_row(component, mask) for component, mask in rows]
    config = LossConfig(aggregation=aggregation)
    counts = component_counts(all_rows)
    whole = row_weights(all_rows, counts, config, MAX_NEW_TOKENS)
    parts = [all_rows[:cut], all_rows[cut:]]
    for component, total in counts.items():
        summed = ComponentCounts()
        for part in parts:
            summed += component_counts(part).get(component, ComponentCounts())
        assert summed == total
        alone = [row for row in all_rows if row.component == component]
        expected = row_weights(alone, component_counts(alone), config, MAX_NEW_TOKENS)
        mine = [w for row, w in zip(all_rows, whole, strict=True) if row.component == component]
        for a, b in zip(mine, expected, strict=True):
            np.testing.assert_array_equal(a, b)
        if total.num_tokens and aggregation in (Aggregation.seq_mean_token_mean, Aggregation.token_mean):
            assert sum(float(w.sum()) for w in mine) == pytest.approx(1.0, rel=1e-5)
    in_parts = [w for part in parts for w in row_weights(part, counts, config, MAX_NEW_TOKENS)]
    for a, b in zip(in_parts, whole, strict=True):
        np.testing.assert_array_equal(a, b)


def test_component_counts_leave_out_masked_rows() -> None:
    rows = [
        make_row("native", [1, 0, 1]),
        make_row("native", [0, 0]),
        make_row("cross:a", [1]),
        make_row("x", []),
    ]
    assert component_counts(rows) == {
        "native": ComponentCounts(num_sequences=1, num_tokens=2),
        "cross:a": ComponentCounts(num_sequences=1, num_tokens=1),
        "x": ComponentCounts(),
    }


def test_component_weight_and_constant_divisor() -> None:
    rows = [make_row("native", [1, 1], weight=0.5)]
    counts = component_counts(rows)
    config = LossConfig(aggregation=Aggregation.constant)
    np.testing.assert_allclose(row_weights(rows, counts, config, 8)[0], [0.5 / 8] * 2)
    config = LossConfig(aggregation=Aggregation.constant, constant_divisor=4.0)
    np.testing.assert_allclose(row_weights(rows, counts, config, 8)[0], [0.5 / 4] * 2)


def test_weights_refuse() -> None:
    with pytest.raises(ValueError, match="global counts say 1 and 2"):
        token_weights(Aggregation.token_mean, [[1, 1], [1]], 1, 2)
    with pytest.raises(ValueError, match="positive constant_divisor, got None"):
        token_weights(Aggregation.constant, [[1]], 1, 1)
    with pytest.raises(ValueError, match="0 or 1 only"):
        token_weights(Aggregation.token_mean, [[0.5]], 1, 1)
    with pytest.raises(ValueError, match=r"no counts for component 'cross:a', only for \['native'\]"):
        row_weights([make_row("cross:a", [1])], {"native": ComponentCounts()}, LossConfig(), 8)
