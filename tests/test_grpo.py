"""``objectives.grpo`` against slow references written from the equations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from copd_megatron.config.schema import AdvantageConfig, KLEstimator, KLPlacement, LossConfig
from copd_megatron.objectives.denominators import ComponentCounts, component_counts
from copd_megatron.objectives.grpo import (
    grpo_advantages,
    informative_groups,
    kl_penalised_advantages,
    native_rows,
    overlong_penalty,
)
from tests.support.rows import MAX_NEW_TOKENS, make_rollout, slow_grpo

rewards_and_groups = st.lists(
    st.tuples(st.sampled_from([0.0, 0.1, 0.25, 1.0, -1.0, 3.7]), st.sampled_from(["a", "b", "c/d"])),
    max_size=20,
)


@given(pairs=rewards_and_groups, normalize=st.booleans())
def test_grpo_advantages_equal_eq_11(pairs: list[tuple[float, str]], normalize: bool) -> None:
    rewards, groups = [p[0] for p in pairs], [p[1] for p in pairs]
    config = AdvantageConfig(normalize_std=normalize)
    result = grpo_advantages(rewards, groups, config)
    assert result.dtype == np.float32
    expected = slow_grpo(rewards, groups, normalize=normalize, epsilon=config.std_epsilon)
    np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-7)
    for group in set(groups):
        assert abs(sum(a for a, g in zip(result, groups, strict=True) if g == group)) < 1e-5


def test_grpo_worked_example() -> None:
    """Rewards 1, 0, 0, 0: mean 1/4, sample standard deviation 1/2."""
    result = grpo_advantages([1, 0, 0, 0], [4, 4, 4, 4], AdvantageConfig(std_epsilon=0.0))
    np.testing.assert_allclose(result, [1.5, -0.5, -0.5, -0.5], rtol=1e-7)


def test_groups_without_spread_get_exactly_zero() -> None:
    """0.1 has no exact mean of three: dividing the rounding error by epsilon must not make a signal."""
    result = grpo_advantages([0.1, 0.1, 0.1, 5.0], [0, 0, 0, 1], AdvantageConfig(std_epsilon=1e-30))
    assert result.tolist() == [0.0] * 4


def test_informative_groups() -> None:
    kept = informative_groups([1, 1, 0, 1, 0], ["x", "y", "x", "y", "z"])
    assert kept.tolist() == [True, False, True, False, False]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rewards_must_be_finite(bad: float) -> None:
    with pytest.raises(ValueError, match=r"rewards: 1 of 3 values are not finite.*at index 1"):
        grpo_advantages([0, bad, 1], [0, 0, 0], AdvantageConfig())
    with pytest.raises(ValueError, match="group_ids"):
        grpo_advantages([0, 1], [0, 0, 0], AdvantageConfig())


# ---- overlong responses, KL in the reward ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "truncated", "expected"),
    [
        (1, False, 0.0),
        (12, False, 0.0),
        (14, False, -0.25),
        (16, False, -0.5),
        (20, True, -0.5),
        (3, True, -0.5),
    ],
)
def test_overlong_penalty(length: int, truncated: bool, expected: float) -> None:
    config = AdvantageConfig(overlong_buffer_tokens=4, overlong_penalty=0.5)
    assert overlong_penalty(length, truncated, 16, config) == pytest.approx(expected)
    assert overlong_penalty(length, truncated, 16, AdvantageConfig()) == 0.0


def test_overlong_buffer_must_fit() -> None:
    with pytest.raises(ValueError, match=r"overlong_buffer_tokens = 17.*max_new_tokens = 16"):
        overlong_penalty(1, False, 16, AdvantageConfig(overlong_buffer_tokens=17))


@pytest.mark.parametrize("estimator", KLEstimator)
def test_kl_in_reward(estimator: KLEstimator) -> None:
    config = LossConfig(kl_coefficient=0.3, kl_estimator=estimator, kl_placement=KLPlacement.reward)
    old, reference, advantages = [-1.0, -2.5, math.nan], [-1.2, -0.3, -math.inf], [0.5, -1.0, 2.0]
    result = kl_penalised_advantages(advantages, old, reference, [1, 1, 0], config)
    for t in range(2):
        x = old[t] - reference[t]
        kl = {KLEstimator.k1: x, KLEstimator.k2: x * x / 2, KLEstimator.k3: math.exp(-x) - 1 + x}[estimator]
        assert result[t] == pytest.approx(advantages[t] - 0.3 * kl, rel=1e-6)
    assert result[2] == 2.0


# ---- rows --------------------------------------------------------------------------------------------------


def test_native_rows() -> None:
    rollouts = [
        make_rollout("s/1", 0, 3, 1.0),
        make_rollout("s/2", 0, 2, 0.0),
        make_rollout("s/1", 1, 8, 0.0, truncated=True),
        make_rollout("s/2", 1, 5, 0.0),
    ]
    config = AdvantageConfig(overlong_filtering=True, overlong_buffer_tokens=4, overlong_penalty=1.0)
    rows = native_rows(rollouts, config, LossConfig(), MAX_NEW_TOKENS)
    shaped = [1.0, 0.0, -1.0, -0.25]
    expected = slow_grpo(shaped, ["1", "2", "1", "2"], normalize=True, epsilon=1e-6)
    for rollout, row, advantage in zip(rollouts, rows, expected, strict=True):
        assert row.component == "native" and row.component_weight == 1.0 and row.weight_version == 7
        np.testing.assert_allclose(row.advantages, [advantage] * rollout.response_length, rtol=1e-6)
        np.testing.assert_array_equal(row.token_ids, rollout.token_ids)
        assert row.rollout_logprobs is rollout.rollout_logprobs
        assert row.prompt_length == 2 and row.old_logprobs is None
        assert row.loss_mask.tolist() == [0.0 if rollout.truncated else 1.0] * rollout.response_length
    assert component_counts(rows)["native"] == ComponentCounts(num_sequences=3, num_tokens=10)
    assert native_rows([], config, LossConfig(), MAX_NEW_TOKENS) == []


@pytest.mark.parametrize("reward", [None, math.nan])
def test_native_rows_need_rewards(reward: float | None) -> None:
    rollouts = [make_rollout("s/1", 0, 3, 1.0), make_rollout("s/1", 1, 3, reward)]
    with pytest.raises(ValueError, match=f"rollout s/1 #1: reward is {reward}"):
        native_rows(rollouts, AdvantageConfig(), LossConfig(), MAX_NEW_TOKENS)


def test_native_rows_with_kl_in_the_reward() -> None:
    rollouts = [make_rollout("s/1", i, 3, float(i)) for i in range(2)]
    old = [np.full(3, -1.0, dtype=np.float32)] * 2
    reference = [np.full(3, -1.5, dtype=np.float32)] * 2
    loss = LossConfig(kl_coefficient=0.2, kl_placement=KLPlacement.reward, kl_estimator=KLEstimator.k1)
    with pytest.raises(ValueError, match="kl_placement 'reward' needs old_logprobs and reference_logprobs"):
        native_rows(rollouts, AdvantageConfig(), loss, MAX_NEW_TOKENS)
    plain = native_rows(rollouts, AdvantageConfig(), LossConfig(), MAX_NEW_TOKENS)
    rows = native_rows(
        rollouts, AdvantageConfig(), loss, MAX_NEW_TOKENS, old_logprobs=old, reference_logprobs=reference
    )
    for row, without in zip(rows, plain, strict=True):
        np.testing.assert_allclose(row.advantages, without.advantages - 0.2 * 0.5, rtol=1e-6)
        np.testing.assert_array_equal(row.old_logprobs, old[0])
        np.testing.assert_array_equal(row.reference_logprobs, reference[0])
