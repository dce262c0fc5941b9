"""Correction factors where the rollout engine and the trainer disagree on the sampling policy. numpy only."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from copd_megatron.config.schema import (
    LossConfig,
    MismatchCorrection,
)
from copd_megatron.objectives.rows import MAX_LOG_RATIO, mask_of, masked_log_ratio
from copd_megatron.records import FloatArray


def mismatch_correction(
    old_logprobs: npt.ArrayLike,
    rollout_logprobs: npt.ArrayLike,
    loss_mask: npt.ArrayLike,
    config: LossConfig,
) -> FloatArray:
    """Factors that make up for the rollout engine and the trainer disagreeing on the sampling policy.

    With rho_t = pi_old(y_t) / pi_rollout(y_t), C = ``mismatch_cap`` and [a, b] = ``mismatch_bounds``:

    * ``none``: 1
    * ``tis_token``: min(rho_t, C)
    * ``tis_sequence``: min(prod_t rho_t, C) for every token of the response
    * ``icepop``: rho_t where a <= rho_t <= b, else 0
    * ``sequence_rejection``: 1 for every token where a <= prod_t rho_t <= b, else 0

    Products run over unmasked tokens: they are the importance ratio of the whole response.

    Args:
        old_logprobs: [R] under the actor at the start of the step.
        rollout_logprobs: [R] under the rollout engine.
        loss_mask: [R]; masked tokens get 1, and their log-probabilities may be anything.

    Returns:
        [R]

    Raises:
        ValueError: shapes differ, an unmasked value is not finite, or cap or bounds make no sense.
    """
    keep = mask_of(loss_mask)
    ones = np.ones(len(keep), dtype=np.float32)
    kind = config.mismatch_correction
    if kind is MismatchCorrection.none:
        return ones
    log_ratio = masked_log_ratio("old_logprobs", old_logprobs, "rollout_logprobs", rollout_logprobs, keep)
    if kind in (MismatchCorrection.tis_sequence, MismatchCorrection.sequence_rejection):
        log_ratio = np.full(len(keep), log_ratio.sum())
    ratio = np.exp(np.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    if kind in (MismatchCorrection.tis_token, MismatchCorrection.tis_sequence):
        if not config.mismatch_cap > 0:
            raise ValueError(f"loss.mismatch_cap = {config.mismatch_cap} must be positive (2.0 is usual)")
        factors = np.minimum(ratio, config.mismatch_cap)
    else:
        low, high = _bounds(config)
        within = (ratio >= low) & (ratio <= high)
        factors = np.where(within, ratio if kind is MismatchCorrection.icepop else 1.0, 0.0)
    return np.where(keep, factors, ones).astype(np.float32)


def _bounds(config: LossConfig) -> tuple[float, float]:
    bounds = list(config.mismatch_bounds)
    if len(bounds) != 2 or not 0 <= bounds[0] <= bounds[1]:
        raise ValueError(
            f"loss.mismatch_bounds = {bounds} must be [lower, upper] with 0 <= lower <= upper, "
            "such as [0.5, 5.0]"
        )
    return float(bounds[0]), float(bounds[1])
