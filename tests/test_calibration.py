"""Uni-OPD's calibration by hand and by its definitions, the reliability gate, the balance of components."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copd_megatron.config.schema import (
    Balance,
    CalibrationConfig,
    Gate,
    GateConfig,
    LossConfig,
    Margin,
    MarginShift,
    MarginStatistic,
    Scope,
)
from copd_megatron.objectives.calibration import Calibrated, calibrate, opened
from copd_megatron.objectives.shares import advantage_shares, balance_factors, mean_sizes
from copd_megatron.records import TrainRow


def _calibrate(
    returns: list[float], rewards: list[float | None], groups: list[str] | None = None, **options: Any
) -> Calibrated:
    """Responses of two tokens whose mean is the given return."""
    deltas = [np.array([value - 0.5, value + 0.5]) for value in returns]
    return calibrate(deltas, rewards, groups or ["p"] * len(returns), CalibrationConfig(**options), 0)


WRONG_ORDER = ([-1.0, 0.0, 1.0, 0.6], [1.0, 1.0, 0.0, 0.0])
"""Correct responses have smaller returns: means -0.5 and 0.8, margin -1.3; min_max -1 - 1 = -2."""


@pytest.mark.parametrize(
    ("shift", "up", "down"),
    [(MarginShift.both, 0.85, -0.85), (MarginShift.lift, 1.7, 0.0), (MarginShift.drop, 0.0, -1.7)],
)
def test_a_shift_restores_the_order(shift: MarginShift, up: float, down: float) -> None:
    found = _calibrate(*WRONG_ORDER, margin=Margin.shift, margin_target=0.4, shift=shift)
    np.testing.assert_allclose(found.shift, [up, up, down, down])
    np.testing.assert_allclose(found.margins_before, [-1.3])
    np.testing.assert_allclose(found.margins_after, [0.4])
    assert found.num_ordered == 0 and found.num_masked_tokens == 0


def test_the_extremes_can_be_what_is_compared() -> None:
    found = _calibrate(
        *WRONG_ORDER, margin=Margin.shift, margin_target=0.4, statistic=MarginStatistic.min_max
    )
    np.testing.assert_allclose(found.margins_before, [-2.0])
    np.testing.assert_allclose(found.margins_after, [0.4])
    np.testing.assert_allclose(found.shift, [1.2, 1.2, -1.2, -1.2])


def test_groups_in_order_or_of_one_class_or_without_verdict_stay_as_they_are() -> None:
    returns = [1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 5.0]
    rewards = [1.0, 0.0, 1.0, 1.0, 0.0, None, None]
    groups = ["ordered", "ordered", "one class", "one class", "unknown", "unknown", "unknown"]
    found = _calibrate(returns, rewards, groups, margin=Margin.shift, margin_target=0.4)
    assert not found.shift.any()
    np.testing.assert_allclose(found.margins_before, [1.0])
    assert found.num_ordered == 1


def test_a_batchs_margin_mixes_its_groups() -> None:
    """Each group alone is in order; together, the second's wrong one is above the first's right one."""
    returns, rewards, groups = [0.0, -0.5, 3.0, 2.5], [1.0, 0.0, 1.0, 0.0], ["a", "a", "b", "b"]
    options: dict[str, Any] = {
        "margin": Margin.shift, "margin_target": 0.4, "statistic": MarginStatistic.min_max,
    }  # fmt: skip
    assert not _calibrate(returns, rewards, groups, **options).shift.any()
    found = _calibrate(returns, rewards, groups, margin_scope=Scope.batch, **options)
    np.testing.assert_allclose(found.margins_before, [-2.5])
    np.testing.assert_allclose(found.shift, [1.45, -1.45, 1.45, -1.45])


def test_a_mask_drops_whoever_helps_most_until_the_order_is_right() -> None:
    """Without response 0 (return -1): 0 - 0.8 = -0.8; without 2 (return 1): -0.5 - 0.6 = -1.1. So 0 goes,
    then 2 (0 - 0.6 = -0.6), then both classes are at their floor of one."""
    found = _calibrate(*WRONG_ORDER, margin=Margin.mask, margin_target=0.0)
    assert [bool(mask.all()) for mask in found.masks] == [False, True, False, True]
    np.testing.assert_allclose(found.margins_after, [-0.6])
    halfway = _calibrate(*WRONG_ORDER, margin=Margin.mask, margin_target=-0.9)
    assert [bool(mask.all()) for mask in halfway.masks] == [False, True, True, True]
    floored = _calibrate(*WRONG_ORDER, margin=Margin.mask, margin_target=0.0, mask_floor=1.0)
    assert all(mask.all() for mask in floored.masks), "everything is kept"


def test_balance_masks_the_excess_and_the_margins_still_see_it() -> None:
    returns, rewards = [1.0] * 6 + [0.0] * 2, [1.0] * 6 + [0.0] * 2
    found = _calibrate(returns, rewards, balance=1.0)
    trains = [bool(mask.all()) for mask in found.masks]
    assert (sum(trains[:6]), sum(trains[6:])) == (2, 2)
    np.testing.assert_allclose(found.margins_after, [1.0])
    wide = _calibrate(returns, rewards, balance=1.5)
    assert sum(bool(mask.all()) for mask in wide.masks[:6]) == 3
    mostly_wrong = _calibrate(returns, [0.0] * 6 + [1.0] * 2, balance=1.0)
    assert [bool(mask.all()) for mask in mostly_wrong.masks][6:] == [True, True]
    assert sum(bool(mask.all()) for mask in mostly_wrong.masks[:6]) == 2
    assert all(mask.all() for mask in _calibrate(returns, [1.0] * 8, balance=1.0).masks), "one class only"
    same = _calibrate(returns, rewards, balance=1.0)
    assert [m.tolist() for m in same.masks] == [m.tolist() for m in found.masks], "the seed decides"


def test_tokens_on_which_both_differ_wildly_are_left_out() -> None:
    deltas = [np.array([0.1, -10.0, 9.9]), np.array([30.0])]
    found = calibrate(deltas, [1.0, 0.0], ["p", "p"], CalibrationConfig(max_gap=10.0), 0)
    assert [mask.tolist() for mask in found.masks] == [[1, 0, 1], [0]]
    assert found.num_masked_tokens == 2


def test_lengths_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="2 responses' scores, 1 rewards"):
        calibrate([np.zeros(1)] * 2, [1.0], ["p", "p"], CalibrationConfig(), 0)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(-5, 5), st.sampled_from([0.0, 1.0, None]), st.sampled_from("ab")), max_size=12
    ),
    st.sampled_from(list(Margin)),
    st.sampled_from(list(MarginStatistic)),
    st.sampled_from(list(Scope)),
    st.sampled_from([None, 0.5, 1.0, 2.0]),
)
def test_whatever_comes_no_margin_gets_worse_and_no_class_is_emptied(
    responses: list[tuple[float, float | None, str]],
    margin: Margin,
    statistic: MarginStatistic,
    scope: Scope,
    balance: float | None,
) -> None:
    returns, rewards, groups = ([r[i] for r in responses] for i in range(3))
    found = _calibrate(
        returns, rewards, groups, margin=margin, statistic=statistic, margin_scope=scope, margin_target=0.3,
        balance=balance, balance_scope=scope,
    )  # fmt: skip
    assert (found.margins_after >= found.margins_before - 1e-9).all()
    if margin is Margin.shift:
        assert (found.margins_after >= 0.3 - 1e-9).all()
    labels = groups if scope is Scope.group else ["all"] * len(groups)
    for label in set(labels):
        members = [i for i, other in enumerate(labels) if other == label]
        for reward in (0.0, 1.0):
            mine = [i for i in members if rewards[i] == reward]
            assert not mine or any(found.masks[i].all() for i in mine)
    for i, reward in enumerate(rewards):
        assert reward is not None or (found.masks[i].all() and found.shift[i] == 0)


# --- the gate ----------------------------------------------------------------------------------------------


def test_the_gate_opens_where_the_teacher_is_better() -> None:
    teacher, student = [1.0, 0.5, 0.25, 0.0], [0.5, 0.5, 0.5, 0.0]
    by_prompt = GateConfig(scope=Gate.prompt)
    assert opened(teacher, student, by_prompt).tolist() == [True, False, False, False]
    assert opened(teacher, student, GateConfig(scope=Gate.prompt, margin=-0.1)).tolist() == [
        *(True, True, False, True),
    ]
    pool = GateConfig(scope=Gate.pool)
    assert opened(teacher, student, pool).all(), "0.4375 against 0.375"
    assert not opened(student, teacher, pool).any()
    assert len(opened([], [], pool)) == 0
    with pytest.raises(ValueError, match="1 pass rates of the teacher, 0 of the student"):
        opened([1.0], [], pool)


# --- the balance of an update's components -----------------------------------------------------------------


def _row(component: str, size: float, weight: float = 1.0) -> TrainRow:
    return TrainRow(
        token_ids=np.zeros(3, np.int32),
        prompt_length=1,
        advantages=np.array([size, -size], np.float32),
        loss_mask=np.ones(2, np.float32),
        component=component,
        component_weight=weight,
    )


def _shares_after(rows: list[TrainRow], factors: dict[str, float]) -> dict[str, float]:
    from dataclasses import replace

    changed = [replace(r, component_weight=r.component_weight * factors[r.component]) for r in rows]
    return advantage_shares(changed, LossConfig(), 8)


def test_shares_are_brought_to_those_of_the_weights() -> None:
    rows = [_row("native", 1.0, weight=3.0), _row("cross:b", 0.2)]
    assert advantage_shares(rows, LossConfig(), 8)["cross:b"] == pytest.approx(0.2 / 3.2)
    factors = balance_factors(rows, LossConfig(balance=Balance.share), 8, {})
    assert _shares_after(rows, factors) == pytest.approx({"native": 0.75, "cross:b": 0.25})


def test_factors_are_bounded_and_a_component_without_advantages_keeps_its_weight() -> None:
    rows = [_row("native", 1.0), _row("cross:b", 1e-6), _row("cross:c", 0.0)]
    factors = balance_factors(rows, LossConfig(balance=Balance.share), 8, {})
    assert factors["cross:b"] == 20.0 and factors["cross:c"] == 1.0
    assert factors["native"] == pytest.approx(0.5, rel=1e-4)


def test_drift_follows_what_became_of_the_advantages() -> None:
    rows = [_row("native", 0.5), _row("cross:b", 2.0), _row("cross:c", 1.0)]
    assert mean_sizes(rows) == pytest.approx({"native": 0.5, "cross:b": 2.0, "cross:c": 1.0})
    loss = LossConfig(balance=Balance.drift, balance_exponent=-1.0)
    factors = balance_factors(rows, loss, 8, {"native": 1.0, "cross:b": 1.0})
    assert factors == pytest.approx({"native": 2.0, "cross:b": 0.5, "cross:c": 1.0})
    as_published = LossConfig(balance=Balance.drift, balance_exponent=0.5)
    factors = balance_factors(rows, as_published, 8, {"native": 1.0, "cross:b": 1.0})
    assert factors["cross:b"] == pytest.approx(2.0**0.5)
