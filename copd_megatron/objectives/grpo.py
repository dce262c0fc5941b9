"""Group-relative policy optimisation: advantages from rewards (Eq. 11), and the rows that carry them.

numpy only; sums in float64, handed over as float32.

Shape legend: ``n`` responses, ``R`` response tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from copd_megatron.config.schema import (
    AdvantageConfig,
    KLEstimator,
    KLPlacement,
    LossConfig,
    MismatchCorrection,
)
from copd_megatron.objectives.base import Context, Material, ObjectiveFactory, TokenLoss
from copd_megatron.objectives.rows import (
    MAX_LOG_RATIO,
    BoolArray,
    Float64Array,
    check_same_length,
    finite_vector,
    label_of,
    mask_of,
    masked_log_ratio,
    per_rollout,
    row_of,
)
from copd_megatron.objectives.surrogate import ClippedSurrogate
from copd_megatron.records import NATIVE, Ask, FloatArray, Rollout, TrainRow


@dataclass(frozen=True, kw_only=True)
class Grpo:
    """The objective of a branch's own rows: advantages of Eq. 11 in the clipped surrogate of Eq. 7."""

    advantage: AdvantageConfig
    loss: LossConfig
    max_new_tokens: int
    """The branch's limit, for overlong shaping and as the divisor of ``loss.aggregation=constant``."""
    asks: ClassVar[Ask] = Ask()
    asks_own: ClassVar[Ask] = Ask()

    @classmethod
    def of(cls, context: Context) -> Self:
        """From ``advantage``, ``loss`` and the branch's rollout settings."""
        return cls(
            advantage=context.config.advantage,
            loss=context.config.loss,
            max_new_tokens=context.settings.rollout.max_new_tokens,
        )

    @property
    def needs_old_logprobs(self) -> bool:
        """For a KL term in the reward, and for the correction of rollout/trainer mismatch."""
        corrected = self.loss.mismatch_correction is not MismatchCorrection.none
        return corrected or kl_in_reward(self.loss)

    def rows(self, material: Material) -> list[TrainRow]:
        """See ``native_rows``."""
        return native_rows(
            material.rollouts,
            self.advantage,
            self.loss,
            self.max_new_tokens,
            component=material.component,
            old_logprobs=material.old_logprobs,
            reference_logprobs=material.reference_logprobs,
        )

    def token_loss(self) -> TokenLoss:
        """The clipped surrogate."""
        return ClippedSurrogate(self.loss, self.max_new_tokens)


OBJECTIVE: ObjectiveFactory = Grpo


def grpo_advantages(rewards: npt.ArrayLike, group_ids: npt.ArrayLike, config: AdvantageConfig) -> FloatArray:
    """Group-relative advantages (Eq. 11): A = (r - mean) / (std + std_epsilon) over the response's group.

    ``std`` is the *sample* standard deviation (divisor G - 1), as in the public GRPO trainers whose
    hyper-parameters the paper uses; Eq. 11 leaves it open. For G = 8 it makes advantages 6.5 % smaller than
    the population one. A group of equal rewards, or of one response, has advantage exactly 0.

    Args:
        rewards: [n]
        group_ids: [n] integers or strings; responses to the same prompt share one. Any order.
        config: ``normalize_std`` false leaves out the division.

    Returns:
        [n]

    Raises:
        ValueError: lengths differ, or a reward is not finite.
    """
    values, index, num_groups = _grouped(rewards, group_ids)
    counts = np.bincount(index, minlength=num_groups)
    means = np.bincount(index, weights=values, minlength=num_groups) / counts
    centred: Float64Array = values - means[index]
    # Rounding of the mean would leave 1e-17 where the rewards are equal, and 1e-11 after the division.
    centred[~informative_groups(rewards, group_ids)] = 0.0
    if config.normalize_std:
        squares = np.bincount(index, weights=centred**2, minlength=num_groups)
        std = np.sqrt(squares / np.maximum(counts - 1, 1))
        centred = centred / (std + config.std_epsilon)[index]
    return centred.astype(np.float32)


def informative_groups(rewards: npt.ArrayLike, group_ids: npt.ArrayLike) -> BoolArray:
    """Which responses belong to a group whose rewards are not all equal (dynamic sampling keeps these).

    Pass the verifier's grades, without overlong shaping: a group that is all wrong at different lengths
    teaches nothing about the task.

    Args:
        rewards: [n]
        group_ids: [n], as for ``grpo_advantages``.

    Returns:
        [n] bool

    Raises:
        ValueError: lengths differ, or a reward is not finite.
    """
    values, index, num_groups = _grouped(rewards, group_ids)
    lowest = np.full(num_groups, np.inf)
    highest = np.full(num_groups, -np.inf)
    np.minimum.at(lowest, index, values)
    np.maximum.at(highest, index, values)
    mixed: BoolArray = (lowest < highest)[index]
    return mixed


def overlong_penalty(
    response_length: int, truncated: bool, max_new_tokens: int, config: AdvantageConfig
) -> float:
    """Soft overlong punishment, to be *added* to the reward: a number in [-overlong_penalty, 0].

    0 up to ``max_new_tokens - overlong_buffer_tokens``, then falling linearly to ``-overlong_penalty`` at
    ``max_new_tokens``. A truncated response gets all of it, also where another limit (the context length)
    cut it short of ``max_new_tokens``.

    Raises:
        ValueError: the buffer is negative or longer than ``max_new_tokens``.
    """
    buffer = config.overlong_buffer_tokens
    if not 0 <= buffer <= max_new_tokens:
        raise ValueError(
            f"advantage.overlong_buffer_tokens = {buffer} must lie in 0 .. max_new_tokens = {max_new_tokens}"
        )
    if buffer == 0:
        return 0.0
    excess = response_length - (max_new_tokens - buffer)
    share = 1.0 if truncated else min(max(excess / buffer, 0.0), 1.0)
    return -config.overlong_penalty * share


def kl_penalised_advantages(
    advantages: npt.ArrayLike,
    old_logprobs: npt.ArrayLike,
    reference_logprobs: npt.ArrayLike,
    loss_mask: npt.ArrayLike,
    config: LossConfig,
) -> FloatArray:
    """KL in the reward (``kl_placement: reward``): A_t - kl_coefficient * KL_t(pi_old || pi_ref).

    With x = log pi_old - log pi_ref, KL_t is x (k1), x^2 / 2 (k2) or exp(-x) - 1 + x (k3). As a reward, k1 is
    the one whose policy gradient is that of the KL. It is taken off after the group normalisation, so its
    strength does not depend on the spread of the rewards.

    Args:
        advantages: [R]
        old_logprobs: [R]
        reference_logprobs: [R]
        loss_mask: [R]; masked tokens keep their advantage, and their log-probabilities may be anything.

    Returns:
        [R]

    Raises:
        ValueError: shapes differ, or an unmasked value is not finite.
    """
    keep = mask_of(loss_mask)
    values = finite_vector("advantages", advantages)
    log_ratio = masked_log_ratio("old_logprobs", old_logprobs, "reference_logprobs", reference_logprobs, keep)
    check_same_length("advantages", values, "loss_mask", keep)
    if config.kl_estimator is KLEstimator.k1:
        kl = log_ratio
    elif config.kl_estimator is KLEstimator.k2:
        kl = 0.5 * log_ratio**2
    else:
        kl = np.expm1(np.clip(-log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO)) + log_ratio
    return (values - config.kl_coefficient * kl).astype(np.float32)


def native_rows(
    rollouts: Sequence[Rollout],
    config: AdvantageConfig,
    loss: LossConfig,
    max_new_tokens: int,
    *,
    component: str = NATIVE,
    old_logprobs: Sequence[FloatArray] | None = None,
    reference_logprobs: Sequence[FloatArray] | None = None,
) -> list[TrainRow]:
    """GRPO rows of graded rollouts: shaping, group advantages spread over tokens, overlong filtering.

    A group is all rollouts whose prompts have the same ``group_id``; it must be passed as a whole, on one
    rank.

    Args:
        rollouts: in any order; rows come back in the same order.
        loss: read for the KL term. With ``kl_placement: reward`` and a coefficient, the penalty goes into
            the advantages here and both log-probabilities are needed.
        max_new_tokens: the branch's limit, for overlong shaping.
        component: name that the rows get.
        old_logprobs: one [R] per rollout under the actor at the start of the step; None: left to the first
            forward pass.
        reference_logprobs: one [R] per rollout under the reference policy; None: not attached.

    Raises:
        ValueError: a rollout has no reward, a reward is not finite, or log-probabilities are missing, of
            the wrong length or not finite.
    """
    olds = per_rollout("old_logprobs", old_logprobs, rollouts)
    references = per_rollout("reference_logprobs", reference_logprobs, rollouts)
    penalised = kl_in_reward(loss)
    if penalised and (old_logprobs is None or reference_logprobs is None):
        raise ValueError(
            "loss.kl_placement 'reward' needs old_logprobs and reference_logprobs when rows are built: score "
            "the rollouts with the actor and the reference policy first, or place the KL term in the loss"
        )
    rewards = [
        _reward(rollout)
        + overlong_penalty(rollout.response_length, rollout.truncated, max_new_tokens, config)
        for rollout in rollouts
    ]
    per_response = grpo_advantages(rewards, [rollout.prompt.group_id for rollout in rollouts], config)
    rows = []
    for rollout, advantage, old, reference in zip(rollouts, per_response, olds, references, strict=True):
        filtered = config.overlong_filtering and rollout.truncated
        row = row_of(rollout, component, np.full(rollout.response_length, advantage, dtype=np.float32))
        row = replace(row, old_logprobs=old, reference_logprobs=reference)
        if filtered:
            row = replace(row, loss_mask=np.zeros_like(row.loss_mask))
        if penalised:
            assert old is not None and reference is not None
            advantages = kl_penalised_advantages(row.advantages, old, reference, row.loss_mask, loss)
            row = replace(row, advantages=advantages)
        rows.append(row)
    return rows


def kl_in_reward(loss: LossConfig) -> bool:
    """Whether the KL term is part of the reward rather than of the loss."""
    return loss.kl_coefficient != 0 and loss.kl_placement is KLPlacement.reward


def _reward(rollout: Rollout) -> float:
    if rollout.reward is None or not np.isfinite(rollout.reward):
        raise ValueError(
            f"{label_of(rollout)}: reward is {rollout.reward}; native rows need graded rollouts, "
            "so run the verifiers first"
        )
    return float(rollout.reward)


def _grouped(rewards: npt.ArrayLike, group_ids: npt.ArrayLike) -> tuple[Float64Array, npt.NDArray[Any], int]:
    """Rewards [n], the index of each one's group [n], and the number of groups."""
    values = finite_vector("rewards", rewards)
    groups, index = np.unique(np.asarray(group_ids), return_inverse=True)
    check_same_length("rewards", values, "group_ids", index)
    return values, index, len(groups)
