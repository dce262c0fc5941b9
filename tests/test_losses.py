"""``losses`` against a slow float64 reference: loops over rows and tokens, written from the equations."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from copd_megatron.config.schema import KLEstimator, KLPlacement, LossConfig, RatioLevel
from copd_megatron.objectives.policy_loss import TokenStreams, kl_penalty, policy_loss

F64 = torch.float64


@dataclass
class Batch:
    logprobs: Tensor
    entropy: Tensor
    streams: TokenStreams


def make_batch(
    seed: int, lengths: tuple[int, ...] = (4, 1, 6, 3), *, spread: float = 0.6, dtype: torch.dtype = F64
) -> Batch:
    """Random streams in which ratios fall on both sides of every clip; some tokens and row 1 are masked."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)

    def normal(scale: float = 1.0) -> Tensor:
        return scale * torch.randn(total, generator=generator, dtype=F64)

    row_index = torch.cat([torch.full((length,), row) for row, length in enumerate(lengths)])
    loss_mask = (torch.rand(total, generator=generator) > 0.2).to(F64)
    loss_mask[row_index == 1] = 0.0
    old = -torch.rand(total, generator=generator, dtype=F64) * 4
    streams = TokenStreams(
        old_logprobs=old.to(dtype),
        advantages=normal(1.5).to(dtype),
        weights=(loss_mask * torch.rand(total, generator=generator, dtype=F64)).to(dtype),
        loss_mask=loss_mask.to(dtype),
        row_index=row_index,
        reference_logprobs=(old + normal(0.5)).to(dtype),
        correction=torch.rand(total, generator=generator, dtype=F64).mul(2).to(dtype),
    )
    return Batch((old + normal(spread)).to(dtype), normal().abs().to(dtype), streams)


def reference_loss(logprobs: Tensor, entropy: Tensor, streams: TokenStreams, config: LossConfig) -> Tensor:
    """Sum over tokens of weight * correction * (clipped surrogate + KL - entropy), one token at a time."""
    loss = torch.zeros((), dtype=F64)
    tokens_of_row: dict[int, list[int]] = {}
    for token in range(len(logprobs)):
        if streams.loss_mask[token] == 1:
            tokens_of_row.setdefault(int(streams.row_index[token]), []).append(token)
    for tokens in tokens_of_row.values():
        if config.ratio_level is RatioLevel.sequence:
            mean = sum(logprobs[t] - streams.old_logprobs[t].to(F64) for t in tokens) / len(tokens)
            ratios = {t: torch.exp(mean) for t in tokens}
        else:
            ratios = {t: torch.exp(logprobs[t] - streams.old_logprobs[t].to(F64)) for t in tokens}
        for t in tokens:
            advantage = float(streams.advantages[t])
            loss = loss + token_weight(streams, t) * (
                reference_surrogate_loss(ratios[t], advantage, config)
                + reference_kl_term(logprobs, streams, t, config)
                - config.entropy_coefficient * entropy[t]
            )
    return loss


def token_weight(streams: TokenStreams, t: int) -> float:
    return float(streams.weights[t]) * (1.0 if streams.correction is None else float(streams.correction[t]))


def reference_surrogate_loss(ratio: Tensor, advantage: float, config: LossConfig) -> Tensor:
    low, high = 1 - config.ratio_clip_min, 1 + config.ratio_clip_max
    if ratio < low:
        clipped = torch.tensor(low, dtype=F64)
    elif ratio > high:
        clipped = torch.tensor(high, dtype=F64)
    else:
        clipped = ratio
    objective = ratio * advantage if ratio * advantage <= clipped * advantage else clipped * advantage
    if config.dual_clip is not None and advantage < 0 and objective < config.dual_clip * advantage:
        objective = torch.tensor(config.dual_clip * advantage, dtype=F64)
    return -objective


def reference_kl_term(logprobs: Tensor, streams: TokenStreams, t: int, config: LossConfig) -> Tensor:
    if config.kl_coefficient == 0 or config.kl_placement is KLPlacement.reward:
        return torch.zeros((), dtype=F64)
    assert streams.reference_logprobs is not None
    x = logprobs[t] - streams.reference_logprobs[t].to(F64)
    if config.kl_estimator is KLEstimator.k2:
        kl = x * x / 2
    elif config.kl_estimator is KLEstimator.k3:
        kl = torch.exp(-x) - 1 + x
    else:
        # Value x, gradient x * grad log pi: a linear function of log pi with slope x.
        slope = x.detach()
        kl = slope + slope * (logprobs[t] - logprobs[t].detach())
    return config.kl_coefficient * kl


def loss_and_gradients(batch: Batch, config: LossConfig, *, reference: bool) -> tuple[Tensor, Tensor, Tensor]:
    logprobs = batch.logprobs.to(F64 if reference else batch.logprobs.dtype).detach().requires_grad_()
    entropy = batch.entropy.to(logprobs.dtype).detach().requires_grad_()
    if reference:
        loss = reference_loss(logprobs, entropy, batch.streams, config)
    else:
        loss = policy_loss(logprobs, entropy, batch.streams, config).loss
    by_logprob, by_entropy = torch.autograd.grad(
        loss, (logprobs, entropy), allow_unused=True, materialize_grads=True
    )
    return loss.detach(), by_logprob, by_entropy


def assert_matches_reference(batch: Batch, config: LossConfig, tolerance: float) -> None:
    mine = loss_and_gradients(batch, config, reference=False)
    slow = loss_and_gradients(batch, config, reference=True)
    for name, a, b in zip(("loss", "d/d logprobs", "d/d entropy"), mine, slow, strict=True):
        torch.testing.assert_close(
            a.to(F64), b, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert slow[1].abs().max() > 1e-3


OPTIONS = [
    {"ratio_level": level, "dual_clip": dual, **kl, "entropy_coefficient": entropy}
    for level, dual, kl, entropy in itertools.product(
        RatioLevel,
        (None, 1.5),
        (
            {},
            *({"kl_coefficient": 0.3, "kl_estimator": estimator} for estimator in KLEstimator),
            {"kl_coefficient": 0.3, "kl_placement": KLPlacement.reward},
        ),
        (0.0, 0.05),
    )
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(str(v) for v in options.values()))
def test_loss_and_gradients_equal_the_equations(options: dict) -> None:
    for seed in range(4):
        batch = make_batch(seed)
        assert_matches_reference(batch, LossConfig(**options), 1e-12)
        without = replace(batch.streams, correction=None)
        assert_matches_reference(replace(batch, streams=without), LossConfig(**options), 1e-12)


def test_float32_stays_close_to_float64() -> None:
    batch = make_batch(5, (40, 1, 70), dtype=torch.float32)
    assert_matches_reference(batch, LossConfig(kl_coefficient=0.1, entropy_coefficient=0.01), 2e-5)


def test_every_clip_is_reached_by_the_random_batches() -> None:
    """Otherwise the comparison above would say nothing about clipping."""
    config = LossConfig(dual_clip=1.5)
    sums = [policy_loss(b.logprobs, None, b.streams, config).statistics for b in map(make_batch, range(4))]
    for name in ("clip_fraction_low", "clip_fraction_high", "dual_clip_fraction"):
        assert sum(float(s[name]) for s in sums) >= 2, name


def test_statistics_equal_token_by_token_sums() -> None:
    batch, config = make_batch(2), LossConfig(dual_clip=1.5, kl_coefficient=0.1, kl_estimator=KLEstimator.k1)
    out = policy_loss(batch.logprobs, batch.entropy, batch.streams, config)
    expected = dict.fromkeys(out.statistics, 0.0)
    for t in range(len(batch.logprobs)):
        if batch.streams.loss_mask[t] == 0:
            continue
        x = float(batch.logprobs[t] - batch.streams.old_logprobs[t])
        advantage = float(batch.streams.advantages[t])
        low = advantage < 0 and math.exp(x) < 0.8
        high = advantage > 0 and math.exp(x) > 1.28
        expected["num_tokens"] += 1
        expected["ratio"] += math.exp(x)
        expected["clip_fraction_low"] += low
        expected["clip_fraction_high"] += high
        expected["clip_fraction"] += low or high
        expected["dual_clip_fraction"] += advantage < 0 and math.exp(x) > 1.5
        expected["approx_kl"] += math.exp(x) - 1 - x
        expected["advantage"] += advantage
        expected["entropy"] += float(batch.entropy[t])
        expected["correction"] += float(batch.streams.correction[t])
        expected["reference_kl"] += float(batch.logprobs[t] - batch.streams.reference_logprobs[t])
    assert {name: float(value) for name, value in out.statistics.items()} == pytest.approx(
        expected, rel=1e-12
    )
    assert float(out.loss) == pytest.approx(sum(float(term) for term in out.terms.values()), rel=1e-12)
    assert not any(value.requires_grad for value in (*out.statistics.values(), *out.terms.values()))


def take(batch: Batch, tokens: Tensor) -> Batch:
    parts = {
        f.name: value[tokens]
        for f in fields(TokenStreams)
        if isinstance(value := getattr(batch.streams, f.name), Tensor)
    }
    return Batch(batch.logprobs[tokens], batch.entropy[tokens], TokenStreams(**parts))


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 1000),
    owners=st.lists(st.integers(0, 2), min_size=6, max_size=6),
    level=st.sampled_from(RatioLevel),
    estimator=st.sampled_from(KLEstimator),
)
def test_micro_batches_add_up_to_the_batch(
    seed: int, owners: list[int], level: RatioLevel, estimator: KLEstimator
) -> None:
    """Rows dealt out to three micro-batches, some maybe empty, in any way."""
    batch = make_batch(seed, (3, 2, 5, 1, 4, 2))
    config = LossConfig(
        ratio_level=level, kl_coefficient=0.2, kl_estimator=estimator, entropy_coefficient=0.1, dual_clip=3.0
    )
    whole = policy_loss(batch.logprobs, batch.entropy, batch.streams, config)
    owner_of_token = torch.tensor(owners)[batch.streams.row_index]
    parts = []
    for owner in range(3):
        part = take(batch, (owner_of_token == owner).nonzero().flatten())
        parts.append(policy_loss(part.logprobs, part.entropy, part.streams, config))
    torch.testing.assert_close(sum(p.loss for p in parts), whole.loss, rtol=1e-10, atol=1e-12)
    for name, value in whole.statistics.items():
        torch.testing.assert_close(sum(p.statistics[name] for p in parts), value, rtol=1e-10, atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), order_seed=st.integers(0, 1000), level=st.sampled_from(RatioLevel))
def test_order_of_tokens_does_not_matter(seed: int, order_seed: int, level: RatioLevel) -> None:
    batch, config = make_batch(seed), LossConfig(ratio_level=level)
    order = torch.randperm(len(batch.logprobs), generator=torch.Generator().manual_seed(order_seed))
    shuffled = take(batch, order)
    torch.testing.assert_close(
        policy_loss(shuffled.logprobs, None, shuffled.streams, config).loss,
        policy_loss(batch.logprobs, None, batch.streams, config).loss,
    )


@pytest.mark.parametrize("level", RatioLevel)
@pytest.mark.parametrize("poison", [-math.inf, math.inf, math.nan])
def test_what_stands_in_masked_tokens_is_ignored(level: RatioLevel, poison: float) -> None:
    batch = make_batch(3)
    config = LossConfig(ratio_level=level, kl_coefficient=0.2, entropy_coefficient=0.1, dual_clip=3.0)
    clean = loss_and_gradients(batch, config, reference=False)
    dirty_parts = {
        name: torch.where(batch.streams.loss_mask > 0, getattr(batch.streams, name), poison)
        for name in ("old_logprobs", "advantages", "weights", "reference_logprobs", "correction")
    }
    dirty = Batch(
        torch.where(batch.streams.loss_mask > 0, batch.logprobs, poison),
        torch.where(batch.streams.loss_mask > 0, batch.entropy, poison),
        replace(batch.streams, **dirty_parts),
    )
    for a, b in zip(loss_and_gradients(dirty, config, reference=False), clean, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    statistics = policy_loss(dirty.logprobs, dirty.entropy, dirty.streams, config).statistics
    assert all(math.isfinite(value) for value in statistics.values())


def test_masked_minus_infinity_leaves_logits_gradients_finite() -> None:
    """A masked token that the logits forbid: the gradient must stay finite behind the log-softmax too."""
    logits = torch.randn(3, 5, dtype=F64)
    logits[1, 2] = -math.inf
    logits.requires_grad_()
    logprobs = logits.log_softmax(-1)[torch.arange(3), torch.tensor([0, 2, 4])]
    streams = TokenStreams(
        old_logprobs=logprobs.detach(),
        advantages=torch.ones(3, dtype=F64),
        weights=torch.tensor([0.5, 0.0, 0.5], dtype=F64),
        loss_mask=torch.tensor([1.0, 0.0, 1.0], dtype=F64),
        row_index=torch.zeros(3, dtype=torch.int64),
    )
    policy_loss(logprobs, None, streams, LossConfig()).loss.backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[1] == 0).all()
    assert (logits.grad[[0, 2]] != 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", RatioLevel)
@pytest.mark.parametrize("jump", [-1e4, -100.0, 100.0, 1e4])
@pytest.mark.parametrize("advantage", [-2.0, 2.0])
def test_huge_log_ratios_stay_finite(
    dtype: torch.dtype, level: RatioLevel, jump: float, advantage: float
) -> None:
    ones = torch.ones(4, dtype=dtype)
    streams = TokenStreams(
        old_logprobs=-ones,
        advantages=advantage * ones,
        weights=ones / 4,
        loss_mask=ones,
        row_index=torch.zeros(4, dtype=torch.int64),
        reference_logprobs=-ones,
    )
    logprobs = (-ones + jump).requires_grad_()
    config = LossConfig(ratio_level=level, kl_coefficient=0.1, dual_clip=3.0)
    out = policy_loss(logprobs, None, streams, config)
    out.loss.backward()
    assert out.loss.dtype is torch.float32
    assert math.isfinite(out.loss.detach())
    assert torch.isfinite(logprobs.grad).all()
    # The reference still pulls: far above it the KL grows by kl_coefficient per nat, over four tokens.
    if jump > 0:
        torch.testing.assert_close(logprobs.grad, 0.025 * ones, rtol=1e-2, atol=0)


def test_a_diverged_policy_is_not_hidden() -> None:
    batch = make_batch(1)
    token = int(batch.streams.loss_mask.nonzero()[0])
    batch.logprobs[token] = math.nan
    assert math.isnan(policy_loss(batch.logprobs, None, batch.streams, LossConfig()).loss)


@pytest.mark.parametrize("level", RatioLevel)
@pytest.mark.parametrize("num_rows", [None, 2])
def test_empty_and_fully_masked_batches_have_zero_loss(level: RatioLevel, num_rows: int | None) -> None:
    for length in (0, 3):
        zeros = torch.zeros(length)
        logprobs = torch.full((length,), -math.inf, requires_grad=True)
        streams = TokenStreams(
            old_logprobs=zeros,
            advantages=zeros + 1,
            weights=zeros,
            loss_mask=zeros,
            row_index=zeros.long(),
            num_rows=num_rows,
        )
        out = policy_loss(logprobs, None, streams, LossConfig(ratio_level=level))
        out.loss.backward()
        assert float(out.loss.detach()) == 0
        assert float(out.statistics["num_tokens"]) == 0
        assert (logprobs.grad == 0).all()


def test_sequence_ratio_is_the_geometric_mean_and_num_rows_changes_nothing() -> None:
    batch = make_batch(8)
    config = LossConfig(ratio_level=RatioLevel.sequence)
    inferred = policy_loss(batch.logprobs, None, batch.streams, config)
    given_rows = policy_loss(batch.logprobs, None, replace(batch.streams, num_rows=9), config)
    assert float(inferred.loss) == float(given_rows.loss)
    kept = batch.streams.loss_mask == 1
    expected = 0.0
    for row in range(4):
        here = kept & (batch.streams.row_index == row)
        if here.any():
            log_ratios = (batch.logprobs - batch.streams.old_logprobs)[here]
            expected += float(here.sum()) * float(log_ratios.exp().prod()) ** (1 / int(here.sum()))
    assert float(inferred.statistics["ratio"]) == pytest.approx(expected, rel=1e-12)


# ------------------------------------------------------- estimators, in exact expectation over a softmax


def expected_gradient(estimator: KLEstimator, logits: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """E over y ~ pi of (value, gradient) of the estimator at y, by enumeration."""
    leaf = logits.clone().requires_grad_()
    logp = leaf.log_softmax(0)
    probabilities = logp.detach().exp()
    per_token = kl_penalty(logp, reference, estimator)
    mean = (probabilities * per_token).sum()
    return mean.detach(), torch.autograd.grad(mean, leaf)[0]


@pytest.mark.parametrize("estimator", KLEstimator)
def test_kl_estimators_in_expectation(estimator: KLEstimator) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, generator=generator, dtype=F64)
    reference = torch.randn(7, generator=generator, dtype=F64).log_softmax(0)
    leaf = logits.clone().requires_grad_()
    logp = leaf.log_softmax(0)
    reverse = (logp.exp() * (logp - reference)).sum()
    forward = (reference.exp() * (reference - logp)).sum()
    (reverse_gradient,) = torch.autograd.grad(reverse, leaf, retain_graph=True)
    (forward_gradient,) = torch.autograd.grad(forward, leaf)
    value, gradient = expected_gradient(estimator, logits, reference)
    if estimator is not KLEstimator.k2:
        torch.testing.assert_close(value, reverse.detach())
    torch.testing.assert_close(
        gradient, forward_gradient if estimator is KLEstimator.k3 else reverse_gradient
    )
    assert (reverse_gradient - forward_gradient).abs().max() > 1e-2


def opd_gradient(student_logits: Tensor, teacher: Tensor, *, swapped: bool) -> Tensor:
    """Expected gradient of the loss on tokens y ~ student, with Eq. 8's advantages."""
    leaf = student_logits.clone().requires_grad_()
    logp = leaf.log_softmax(0)
    student = logp.detach()
    count = len(teacher)
    streams = TokenStreams(
        old_logprobs=student,
        advantages=(student - teacher) if swapped else (teacher - student),
        weights=student.exp(),
        loss_mask=torch.ones(count, dtype=F64),
        row_index=torch.arange(count),
    )
    loss = policy_loss(logp, None, streams, LossConfig()).loss
    return torch.autograd.grad(loss, leaf)[0]


def test_opd_descends_the_reverse_kl_and_the_swap_climbs_it() -> None:
    """On-policy, Eq. 8 with the surrogate is exactly the gradient of KL(student || teacher)."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(9, generator=generator, dtype=F64)
    teacher = torch.randn(9, generator=generator, dtype=F64).log_softmax(0)
    leaf = logits.clone().requires_grad_()
    logp = leaf.log_softmax(0)
    (kl_gradient,) = torch.autograd.grad((logp.exp() * (logp - teacher)).sum(), leaf)
    torch.testing.assert_close(opd_gradient(logits, teacher, swapped=False), kl_gradient)
    torch.testing.assert_close(opd_gradient(logits, teacher, swapped=True), -kl_gradient)


# ------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("config", "change", "match"),
    [
        (LossConfig(kl_coefficient=0.1), {"reference_logprobs": None}, "needs reference_logprobs"),
        (LossConfig(dual_clip=1.0), {}, "dual_clip = 1.0 must be above 1"),
        (LossConfig(ratio_clip_min=1.5), {}, "ratio_clip_min"),
        (LossConfig(ratio_clip_max=-0.1), {}, "ratio_clip_max"),
        (LossConfig(), {"advantages": torch.zeros(3)}, "advantages has shape"),
    ],
)
def test_bad_inputs_are_refused(config: LossConfig, change: dict, match: str) -> None:
    batch = make_batch(0)
    with pytest.raises(ValueError, match=match):
        policy_loss(batch.logprobs, None, replace(batch.streams, **change), config)


def test_entropy_bonus_needs_entropy_and_logprobs_must_be_flat() -> None:
    batch = make_batch(0)
    with pytest.raises(ValueError, match="needs the policy's entropy"):
        policy_loss(batch.logprobs, None, batch.streams, LossConfig(entropy_coefficient=0.1))
    with pytest.raises(ValueError, match="must be flat"):
        policy_loss(batch.logprobs[None], None, batch.streams, LossConfig())
