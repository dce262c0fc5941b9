"""The policy loss, as a pure function of per-token streams.

Native (GRPO) and cross (OPD) tokens look alike here: an advantage, a weight and an old log-probability.
The weights already hold every denominator, so losses of micro-batches and ranks add up to the loss of the
whole batch; nothing in this file averages.

Shape legend: ``N`` response tokens of the micro-batch, flattened; ``B`` its rows (sequences).

Numerical safety: log-ratios are bounded to ``+-MAX_LOG_RATIO`` before they are exponentiated, and whatever
stands in a token with loss mask 0 (infinities and NaN included) reaches neither the loss nor a gradient.
A non-finite *unmasked* log-probability is a fault of the model: NaN goes through to the loss, to be seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from copd_megatron.config.schema import KLEstimator, KLPlacement, LossConfig, RatioLevel, Surrogate
from copd_megatron.objectives.base import LossOutput
from copd_megatron.objectives.rows import MAX_LOG_RATIO


@dataclass(frozen=True, kw_only=True)
class TokenStreams:
    """What the loss needs to know about each response token besides the policy's own outputs."""

    old_logprobs: Tensor
    """[N] under the actor at the start of the step."""
    advantages: Tensor
    """[N]"""
    weights: Tensor
    """[N] loss mask x aggregation weight x component weight / global denominator: the sum over all tokens
    of all ranks of ``weight * token loss`` is the loss (see ``denominators.row_weights``)."""
    loss_mask: Tensor
    """[N] 0 or 1. Masked tokens count neither in the loss nor in the statistics."""
    row_index: Tensor
    """[N] int64, the row in 0..B-1 that a token belongs to; read for sequence-level ratios only."""
    num_rows: int | None = None
    """B. None: taken from ``row_index``, at the price of a device synchronisation."""
    reference_logprobs: Tensor | None = None
    """[N] under the reference policy, for the KL term."""
    correction: Tensor | None = None
    """[N] rollout/trainer mismatch factor (``mismatch.mismatch_correction``), a constant that multiplies
    all of a token's loss terms; 0 drops the token's loss but leaves the denominators as they are."""


def policy_loss(
    logprobs: Tensor, entropy: Tensor | None, streams: TokenStreams, config: LossConfig
) -> LossOutput:
    """Clipped surrogate (Eq. 7) with its options, summed over the tokens of a micro-batch.

    Per token, with ratio rho = pi/pi_old and advantage A::

        surrogate = min(rho * A, clip(rho, 1 - ratio_clip_min, 1 + ratio_clip_max) * A)
        surrogate = max(surrogate, dual_clip * A)                           if A < 0 and dual_clip is set
        loss      = correction * (-surrogate + kl_coefficient * KL - entropy_coefficient * entropy)

    ``surrogate: cispo`` (MiniMax-M1) takes sg(clip(rho)) * A * log pi instead: no token loses its gradient.
    ``sapo`` (soft adaptive policy optimisation) takes 4 / tau * sigmoid(tau (rho - 1)) * A, with a tau of its
    own for positive and negative advantages.

    ``ratio_level: sequence`` (GSPO) takes rho = exp(mean over the row's unmasked tokens of log pi/pi_old)
    for every token of the row, gradient flowing through the mean. A row must then be whole within the
    micro-batch.

    Args:
        logprobs: [N] of the sampled tokens under the policy, with gradient.
        entropy: [N] of the policy at each token (nats), with gradient if the bonus is on; or None.
        streams: the other per-token inputs, on the same device.
        config: the options. ``aggregation`` and ``mismatch_correction`` are not read: they are in
            ``streams.weights`` and ``streams.correction``.

    Returns:
        The loss; ``terms`` ``policy_loss``, and where switched on ``kl_loss`` and ``entropy_loss``; and
        ``statistics``: ``ratio``; ``clip_fraction`` = ``clip_fraction_low`` + ``clip_fraction_high``, tokens
        whose gradient clipping stops; ``dual_clip_fraction``; ``approx_kl``, the k3 estimate of
        KL(old || new); ``advantage``; where given ``entropy``, ``reference_kl`` (the configured estimator)
        and ``correction``.

    Raises:
        ValueError: shapes differ, an option lacks its input, or an option's value is out of range.
    """
    _check_inputs(logprobs, entropy, streams, config)
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    keep = streams.loss_mask > 0

    def masked(values: Tensor) -> Tensor:
        """Zero where masked. ``where`` rather than a product: 0 * inf is NaN, in the gradient as well."""
        return torch.where(keep, values.to(dtype), 0.0)

    logprobs = masked(logprobs)
    advantages = masked(streams.advantages)
    correction = None if streams.correction is None else masked(streams.correction.detach())
    weights = masked(streams.weights)
    token_weights = weights if correction is None else weights * correction

    token_log_ratio = logprobs - masked(streams.old_logprobs.detach())
    log_ratio = token_log_ratio
    if config.ratio_level is RatioLevel.sequence:
        log_ratio = _sequence_log_ratio(token_log_ratio, keep, streams.row_index, streams.num_rows)
    token_loss, statistics = _clipped_surrogate(log_ratio, advantages, config)
    terms = {"policy_loss": (token_weights * token_loss).sum()}

    statistics["approx_kl"] = kl_penalty(
        -token_log_ratio.detach(), torch.zeros_like(logprobs), KLEstimator.k3
    )
    statistics["advantage"] = advantages
    if correction is not None:
        statistics["correction"] = correction

    if streams.reference_logprobs is not None:
        kl = kl_penalty(logprobs, masked(streams.reference_logprobs.detach()), config.kl_estimator)
        statistics["reference_kl"] = kl
        if _kl_in_loss(config):
            terms["kl_loss"] = config.kl_coefficient * (token_weights * kl).sum()

    if entropy is not None:
        entropy = masked(entropy)
        statistics["entropy"] = entropy
        if config.entropy_coefficient != 0:
            terms["entropy_loss"] = -config.entropy_coefficient * (token_weights * entropy).sum()

    sums = {name: masked(value.detach()).sum() for name, value in statistics.items()}
    sums["num_tokens"] = keep.to(dtype).sum()
    return LossOutput(
        loss=torch.stack(list(terms.values())).sum(),
        terms={name: term.detach() for name, term in terms.items()},
        statistics=sums,
    )


def kl_penalty(logprobs: Tensor, reference_logprobs: Tensor, estimator: KLEstimator) -> Tensor:
    """Schulman's per-token estimates of KL(policy || reference), with x = log pi - log pi_ref.

    On tokens sampled from the policy:

    * ``k1`` = x. Unbiased, may be negative. Its own gradient, grad log pi, has expectation zero and would
      regularise nothing, so the *value* is k1's and the *gradient* k2's, x * grad log pi, which is the
      unbiased gradient of the KL.
    * ``k2`` = x^2 / 2. Biased value, unbiased gradient.
    * ``k3`` = exp(-x) - 1 + x. Unbiased, never negative; differentiated as it stands, as GRPO does, which
      in expectation is the gradient of the other direction, KL(reference || policy).

    Args:
        logprobs: [N] log pi, with gradient.
        reference_logprobs: [N] log pi_ref, constant.

    Returns:
        [N], in nats.
    """
    log_ratio = logprobs - reference_logprobs
    if estimator is KLEstimator.k3:
        # Only the exponential can overflow: the linear part keeps its gradient at any distance.
        return torch.expm1((-log_ratio).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)) + log_ratio
    k2 = 0.5 * log_ratio.square()
    if estimator is KLEstimator.k2:
        return k2
    return log_ratio.detach() + (k2 - k2.detach())


def _clipped_surrogate(
    log_ratio: Tensor, advantages: Tensor, config: LossConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Per-token loss [N] and per-token statistics {name: [N]} from [N] log-ratios."""
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    low, high = 1.0 - config.ratio_clip_min, 1.0 + config.ratio_clip_max
    if config.surrogate is Surrogate.cispo:
        surrogate = ratio.detach().clamp(low, high) * advantages * log_ratio
    elif config.surrogate is Surrogate.sapo:
        surrogate = _soft_gate(ratio, advantages, config) * advantages
    else:
        surrogate = torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    clip_low = (advantages < 0) & (ratio < low)
    clip_high = (advantages > 0) & (ratio > high)
    statistics = {
        "ratio": ratio,
        "clip_fraction": clip_low | clip_high,
        "clip_fraction_low": clip_low,
        "clip_fraction_high": clip_high,
    }
    if config.dual_clip is not None and config.surrogate is Surrogate.clipped:
        # With c > 1 + ratio_clip_max the bound acts on negative advantages only; the explicit test keeps
        # that true for every c.
        bound = config.dual_clip * advantages
        bounded = (advantages < 0) & (surrogate < bound)
        surrogate = torch.where(bounded, bound, surrogate)
        statistics["dual_clip_fraction"] = bounded
    return -surrogate, statistics


def _soft_gate(ratio: Tensor, advantages: Tensor, config: LossConfig) -> Tensor:
    """SAPO's gate of the ratio, [N]: 4 / tau sigmoid(tau (rho - 1)), whose slope is 1 at rho = 1 and fades on
    both sides, faster for a larger tau."""
    tau = torch.where(advantages > 0, config.sapo_temperature_positive, config.sapo_temperature_negative).to(
        ratio.dtype
    )
    return 4.0 / tau * torch.sigmoid(tau * (ratio - 1.0))


def _sequence_log_ratio(log_ratio: Tensor, keep: Tensor, row_index: Tensor, num_rows: int | None) -> Tensor:
    """GSPO's mean log-ratio of a token's row, [N]; ``log_ratio`` is zero where masked."""
    if num_rows is None:
        num_rows = int(row_index.max()) + 1 if row_index.numel() else 0
    zeros = log_ratio.new_zeros(num_rows)
    sums = zeros.index_add(0, row_index, log_ratio)
    counts = zeros.index_add(0, row_index, keep.to(log_ratio.dtype))
    return (sums / counts.clamp(min=1.0)).index_select(0, row_index)


def _kl_in_loss(config: LossConfig) -> bool:
    return config.kl_coefficient != 0 and config.kl_placement is KLPlacement.loss


def _check_inputs(
    logprobs: Tensor, entropy: Tensor | None, streams: TokenStreams, config: LossConfig
) -> None:
    """Cheap checks on shapes and options; none of them synchronises with the device."""
    if logprobs.ndim != 1:
        raise ValueError(
            f"logprobs must be flat [N], got shape {list(logprobs.shape)}: flatten the response tokens"
        )
    named = {
        "entropy": entropy,
        "old_logprobs": streams.old_logprobs,
        "advantages": streams.advantages,
        "weights": streams.weights,
        "loss_mask": streams.loss_mask,
        "row_index": streams.row_index,
        "reference_logprobs": streams.reference_logprobs,
        "correction": streams.correction,
    }
    for name, tensor in named.items():
        if tensor is not None and tensor.shape != logprobs.shape:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}, logprobs {list(logprobs.shape)}: "
                "every stream must hold one value per response token"
            )
    if _kl_in_loss(config) and streams.reference_logprobs is None:
        raise ValueError(
            f"loss.kl_coefficient = {config.kl_coefficient} needs reference_logprobs, the streams have none: "
            "score the rows with the reference policy, or set the coefficient to 0"
        )
    if config.entropy_coefficient != 0 and entropy is None:
        raise ValueError(
            f"loss.entropy_coefficient = {config.entropy_coefficient} needs the policy's entropy: "
            "compute it in the forward pass, or set the coefficient to 0"
        )
    if config.dual_clip is not None and not config.dual_clip > 1:
        raise ValueError(
            f"loss.dual_clip = {config.dual_clip} must be above 1 (3.0 is usual); null switches it off"
        )
    if not 0 <= config.ratio_clip_min <= 1 or config.ratio_clip_max < 0:
        raise ValueError(
            f"loss.ratio_clip_min = {config.ratio_clip_min}, ratio_clip_max = {config.ratio_clip_max}: "
            "the ratio is clipped to [1 - min, 1 + max], so min must be in [0, 1] and max at least 0"
        )
