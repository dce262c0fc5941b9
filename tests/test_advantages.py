"""``advantages`` against slow float64 references written from the equations, and whole batches end to end."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from copd_megatron.config.schema import (
    AdvantageConfig,
    Aggregation,
    KLEstimator,
    KLPlacement,
    LossConfig,
    MismatchCorrection,
)
from copd_megatron.objectives.denominators import (
    ComponentCounts,
    component_counts,
    row_weights,
    token_weights,
)
from copd_megatron.objectives.grpo import (
    grpo_advantages,
    informative_groups,
    kl_penalised_advantages,
    native_rows,
    overlong_penalty,
)
from copd_megatron.objectives.mismatch import mismatch_correction
from copd_megatron.objectives.policy_loss import TokenStreams, policy_loss
from copd_megatron.objectives.sampled_token import cross_rows, opd_advantages
from copd_megatron.records import Prompt, Rollout, TrainRow

MAX_NEW_TOKENS = 8
finite = st.floats(-30, 0, allow_nan=False)


def make_rollout(
    prompt_id: str, sample: int, length: int, reward: float | None, **changes: object
) -> Rollout:
    generator = np.random.default_rng([sample, length, *map(ord, prompt_id)])
    prompt = Prompt(
        prompt_id=prompt_id,
        domain="text",
        token_ids=np.array([1, 2], dtype=np.int32),
        answer="",
        verifier="exact",
    )
    rollout = Rollout(
        prompt=prompt,
        sample_index=sample,
        token_ids=np.concatenate([prompt.token_ids, generator.integers(3, 9, length)]).astype(np.int32),
        rollout_logprobs=-generator.random(length).astype(np.float32),
        text="",
        truncated=False,
        weight_version=7,
        seed=0,
        reward=reward,
    )
    return replace(rollout, **changes)


def make_row(component: str, mask: list[int], weight: float = 1.0) -> TrainRow:
    return TrainRow(
        token_ids=np.arange(len(mask) + 1, dtype=np.int32),
        prompt_length=1,
        advantages=np.zeros(len(mask), dtype=np.float32),
        loss_mask=np.array(mask, dtype=np.float32),
        component=component,
        component_weight=weight,
    )


# ------------------------------------------------------------------------------------ GRPO advantages


def slow_grpo(rewards: list[float], groups: list, *, normalize: bool, epsilon: float) -> list[float]:
    result = []
    for reward, group in zip(rewards, groups, strict=True):
        members = [r for r, g in zip(rewards, groups, strict=True) if g == group]
        mean = math.fsum(members) / len(members)
        if len(set(members)) == 1:
            result.append(0.0)
            continue
        variance = math.fsum((r - mean) ** 2 for r in members) / (len(members) - 1)
        result.append((reward - mean) / (math.sqrt(variance) + epsilon) if normalize else reward - mean)
    return result


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


# ------------------------------------------------------------------------------------- OPD advantages


@given(
    pairs=st.lists(st.tuples(finite, finite), max_size=12),
    beta=st.floats(-2, 2),
    clip=st.none() | st.floats(0.1, 10),
)
def test_opd_advantages_equal_eq_8(pairs: list[tuple[float, float]], beta: float, clip: float | None) -> None:
    teacher, student = [p[0] for p in pairs], [p[1] for p in pairs]
    expected = []
    for t, s in pairs:
        delta = t - s
        if clip is not None:
            delta = max(-clip, min(clip, delta))
        expected.append(beta * delta)
    result = opd_advantages(teacher, student, beta, clip)
    np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-30)
    np.testing.assert_array_equal(opd_advantages(student, teacher, beta, clip), -result)


def test_opd_advantage_is_positive_where_the_teacher_likes_the_token_better() -> None:
    teacher, student = np.log([0.9, 0.1]), np.log([0.3, 0.2])
    result = opd_advantages(teacher, student, 2.0)
    np.testing.assert_allclose(result, [2 * math.log(3), 2 * math.log(0.5)], rtol=1e-6)


@pytest.mark.parametrize(
    ("teacher", "student", "kwargs", "match"),
    [
        ([0.0, -math.inf], [0.0, 0.0], {"beta": 1.0}, r"teacher_logprobs.*-inf at index 1"),
        ([0.0, 0.0], [math.nan, 0.0], {"beta": 1.0}, r"student_logprobs.*nan at index 0"),
        ([0.0], [0.0, 0.0], {"beta": 1.0}, "must agree"),
        ([[0.0]], [[0.0]], {"beta": 1.0}, "one-dimensional"),
        ([0.0], [0.0], {"beta": math.inf}, "beta = inf"),
        ([0.0], [0.0], {"beta": 1.0, "delta_clip": 0.0}, "delta_clip = 0.0 must be positive"),
    ],
)
def test_opd_refuses(teacher: list, student: list, kwargs: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        opd_advantages(teacher, student, **kwargs)


# ------------------------------------------------------------------------------------------- weights


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


# ------------------------------------------------------------------------------- mismatch correction


def slow_correction(old: list, rollout: list, mask: list, config: LossConfig) -> list[float]:
    kind, (low, high) = config.mismatch_correction, config.mismatch_bounds
    product = 1.0
    for o, r, m in zip(old, rollout, mask, strict=True):
        if m:
            product *= math.exp(o) / math.exp(r)
    result = []
    for o, r, m in zip(old, rollout, mask, strict=True):
        rho = math.exp(o) / math.exp(r)
        if not m or kind is MismatchCorrection.none:
            result.append(1.0)
        elif kind is MismatchCorrection.tis_token:
            result.append(min(rho, config.mismatch_cap))
        elif kind is MismatchCorrection.tis_sequence:
            result.append(min(product, config.mismatch_cap))
        elif kind is MismatchCorrection.icepop:
            result.append(rho if low <= rho <= high else 0.0)
        else:
            result.append(1.0 if low <= product <= high else 0.0)
    return result


@pytest.mark.parametrize("kind", MismatchCorrection)
def test_mismatch_correction_equals_the_formulas(kind: MismatchCorrection) -> None:
    generator = random.Random(0)
    config = LossConfig(mismatch_correction=kind, mismatch_cap=1.5, mismatch_bounds=[0.6, 1.6])
    seen = set()
    for _ in range(200):
        length = generator.randint(0, 4)
        old = [generator.uniform(-3, 0) for _ in range(length)]
        rollout = [o + generator.gauss(0, 0.4) for o in old]
        mask = [generator.randint(0, 1) for _ in range(length)]
        result = mismatch_correction(old, rollout, mask, config)
        expected = slow_correction(old, rollout, mask, config)
        np.testing.assert_allclose(result, expected, rtol=1e-5)
        seen |= {e for e, m in zip(expected, mask, strict=True) if m}
    if kind is MismatchCorrection.none:
        assert seen == {1.0}
    elif kind in (MismatchCorrection.icepop, MismatchCorrection.sequence_rejection):
        assert 0.0 in seen and len(seen) > 1
    else:
        assert 1.5 in seen and len(seen) > 10


@pytest.mark.parametrize("kind", MismatchCorrection)
def test_mismatch_correction_is_neutral_when_engines_agree_and_safe_when_they_do_not(
    kind: MismatchCorrection,
) -> None:
    config = LossConfig(mismatch_correction=kind)
    logprobs = np.array([-0.5, -2.0, -1.0])
    np.testing.assert_array_equal(mismatch_correction(logprobs, logprobs, [1, 1, 1], config), 1.0)
    masked = np.array([-0.5, -math.inf, math.nan])
    np.testing.assert_array_equal(mismatch_correction(masked, logprobs, [1, 0, 0], config), 1.0)
    apart = mismatch_correction([0.0] * 3, [-1e4] * 3, [1, 1, 1], config)
    assert np.isfinite(apart).all() and apart.max() <= 2.0


def test_mismatch_correction_refuses() -> None:
    tis = LossConfig(mismatch_correction=MismatchCorrection.tis_token)
    with pytest.raises(ValueError, match="rollout_logprobs: 1 of 2 values are not finite"):
        mismatch_correction([0, 0], [0, -math.inf], [1, 1], tis)
    with pytest.raises(ValueError, match="must agree"):
        mismatch_correction([0, 0], [0], [1, 1], tis)
    with pytest.raises(ValueError, match="mismatch_cap"):
        mismatch_correction([0], [0], [1], replace(tis, mismatch_cap=0.0))
    icepop = LossConfig(mismatch_correction=MismatchCorrection.icepop, mismatch_bounds=[2.0, 1.0])
    with pytest.raises(ValueError, match="mismatch_bounds"):
        mismatch_correction([0], [0], [1], icepop)


# ------------------------------------------------------------------------------ overlong, KL in reward


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


# ---------------------------------------------------------------------------------------------- rows


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


def test_cross_rows() -> None:
    rollouts = [make_rollout("i/1", 0, 2, None), make_rollout("i/2", 0, 3, None)]
    teacher = [np.array([-0.5, -1.0]), np.array([-3.0, -0.1, -0.2])]
    student = [np.array([-1.0, -1.0]), np.array([-0.5, -0.5, -0.5])]
    rows = cross_rows(
        rollouts, teacher, student, component="cross:image", teacher="image", beta=2.0, delta_clip=1.0
    )
    np.testing.assert_allclose(rows[0].advantages, [1.0, 0.0], rtol=1e-6)
    np.testing.assert_allclose(rows[1].advantages, [-2.0, 0.8, 0.6], rtol=1e-6)
    for row, mine in zip(rows, student, strict=True):
        assert row.component == "cross:image"
        np.testing.assert_allclose(row.old_logprobs, mine)
        assert row.loss_mask.all() and row.weight_version == 7


def test_cross_rows_name_what_is_wrong() -> None:
    rollouts = [make_rollout("i/1", 3, 2, None)]
    good = [np.zeros(2)]
    with pytest.raises(ValueError, match=r"rollout i/1 #3, scored by teacher 'image': teacher_logprobs"):
        cross_rows(
            rollouts, [np.array([0.0, np.nan])], good, component="cross:image", teacher="image", beta=1.0
        )
    with pytest.raises(ValueError, match=r"rollout i/1 #3: teacher_logprobs has shape \[3\] for 2 response"):
        cross_rows(rollouts, [np.zeros(3)], good, component="cross:image", teacher="image", beta=1.0)
    with pytest.raises(ValueError, match="2 teacher_logprobs for 1 rollouts"):
        cross_rows(rollouts, good * 2, good, component="cross:image", teacher="image", beta=1.0)
    torn = [replace(rollouts[0], rollout_logprobs=np.zeros(1, dtype=np.float32))]
    with pytest.raises(ValueError, match="1 rollout_logprobs for 2 response tokens"):
        cross_rows(torn, good, good, component="cross:image", teacher="image", beta=1.0)


# --------------------------------------------------- rewards and scores to loss, as Alg. 1 lines 9-12


def slow_update_loss(
    native: list, cross: list, theta: dict, beta: float, low: float, high: float
) -> torch.Tensor:
    """Eq. 7 + 11 on native groups plus Eq. 8 on cross responses: means of means, straight from the paper.

    native: (rollout, old log-probabilities); cross: (rollout, old, teacher). theta: id -> log pi, a leaf.
    """

    def surrogate(rho: torch.Tensor, advantage: float) -> torch.Tensor:
        return torch.minimum(rho * advantage, torch.clamp(rho, 1 - low, 1 + high) * advantage)

    rewards = [rollout.reward for rollout, _ in native]
    groups = [rollout.prompt.prompt_id for rollout, _ in native]
    responses = []
    for (rollout, old), advantage in zip(
        native, slow_grpo(rewards, groups, normalize=True, epsilon=1e-6), strict=True
    ):
        logp = theta[id(rollout)]
        terms = [surrogate(torch.exp(logp[t] - old[t]), advantage) for t in range(len(old))]
        responses.append(sum(terms) / len(terms))
    loss = -sum(responses) / len(responses)
    responses = []
    for rollout, old, teacher in cross:
        logp = theta[id(rollout)]
        terms = [
            surrogate(torch.exp(logp[t] - old[t]), beta * float(teacher[t] - old[t])) for t in range(len(old))
        ]
        responses.append(sum(terms) / len(terms))
    return loss - sum(responses) / len(responses)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10_000), num_ranks=st.integers(1, 3))
def test_one_update_of_native_and_cross_rows_equals_the_paper(seed: int, num_ranks: int) -> None:
    generator = np.random.default_rng(seed)

    def logprobs(length: int) -> np.ndarray:
        return -generator.random(length).astype(np.float32) * 3

    lengths = generator.integers(1, 6, 8)
    native = [
        make_rollout(f"t/{i // 3}", i % 3, int(lengths[i]), float(generator.integers(0, 2))) for i in range(6)
    ]
    cross = [make_rollout("i/9", i, int(lengths[6 + i]), None) for i in range(2)]
    old = {id(r): logprobs(r.response_length) for r in native + cross}
    teacher = {id(r): logprobs(r.response_length) for r in cross}
    theta = {
        id(r): torch.tensor(old[id(r)] + 0.3 * generator.standard_normal(r.response_length)).requires_grad_()
        for r in native + cross
    }
    slow = slow_update_loss(
        [(r, torch.tensor(old[id(r)], dtype=torch.float64)) for r in native],
        [(r, torch.tensor(old[id(r)], dtype=torch.float64), teacher[id(r)].astype(float)) for r in cross],
        theta,
        beta=0.7,
        low=0.2,
        high=0.28,
    )
    slow_gradients = torch.autograd.grad(slow, list(theta.values()))

    config = LossConfig()
    rows = native_rows(
        native, AdvantageConfig(), config, MAX_NEW_TOKENS, old_logprobs=[old[id(r)] for r in native]
    )
    rows += cross_rows(
        cross,
        [teacher[id(r)] for r in cross],
        [old[id(r)] for r in cross],
        component="cross:image",
        teacher="image",
        beta=0.7,
    )
    order = {id(row): theta[id(r)] for row, r in zip(rows, native + cross, strict=True)}
    counts = component_counts(rows)
    total = torch.zeros((), dtype=torch.float64)
    for rank in range(num_ranks):
        mine = rows[rank::num_ranks]
        weights = row_weights(mine, counts, config, MAX_NEW_TOKENS)
        streams = TokenStreams(
            old_logprobs=torch.tensor(np.concatenate([row.old_logprobs for row in mine])),
            advantages=torch.tensor(np.concatenate([row.advantages for row in mine])),
            weights=torch.tensor(np.concatenate(weights)),
            loss_mask=torch.tensor(np.concatenate([row.loss_mask for row in mine])),
            row_index=torch.tensor(np.repeat(np.arange(len(mine)), [row.response_length for row in mine])),
        )
        total = total + policy_loss(torch.cat([order[id(row)] for row in mine]), None, streams, config).loss
    torch.testing.assert_close(total, slow, rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(total, list(theta.values()))
    for a, b in zip(gradients, slow_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_weights_and_factors_import_neither_torch_nor_engines() -> None:
    code = (
        "import sys, copd_megatron.objectives.denominators, copd_megatron.objectives.mismatch; "
        "print([m for m in ('torch', 'megatron', 'vllm', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
