"""Advantages, per-token weights and the rows that carry them to the actor: numpy only.

GRPO (Eq. 11) and OPD (Eq. 8) end here: from this file on, a native token and a cross token differ in their
numbers only. Sums are taken in float64 and handed over as float32.

Shape legend: ``n`` responses, ``R`` response tokens of one row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from copd_megatron.config.schema import (
    AdvantageConfig,
    Aggregation,
    KLEstimator,
    KLPlacement,
    LossConfig,
    MismatchCorrection,
)
from copd_megatron.records import FloatArray, Rollout, TrainRow

NATIVE = "native"
"""Component of a branch's own rows; rows taught by a teacher belong to ``cross_component(teacher)``."""

_MAX_LOG_RATIO = 20.0
"""Bound on log-ratios before they are exponentiated, as in ``losses``."""

Float64Array = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


def cross_component(teacher: str) -> str:
    """Component name of the rows that ``teacher`` scored."""
    return f"cross:{teacher}"


# ---------------------------------------------------------------------------------------- advantages


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


def opd_advantages(
    teacher_logprobs: npt.ArrayLike,
    student_logprobs: npt.ArrayLike,
    beta: float,
    delta_clip: float | None = None,
) -> FloatArray:
    """On-policy distillation advantages (Eq. 8): A_t = beta * (log pi_teacher(y_t) - log pi_student(y_t)).

    Positive where the teacher finds the student's token likelier than the student does. Constants: no
    gradient flows through them.

    Args:
        teacher_logprobs: [R] of the student's tokens under the teacher.
        student_logprobs: [R] of the same tokens under the student that sampled them.
        beta: the edge's strength.
        delta_clip: bound on |delta| before it is multiplied by beta; None: no bound.

    Returns:
        [R]

    Raises:
        ValueError: shapes differ, a value is not finite, or ``delta_clip`` is not positive.
    """
    teacher = _finite_vector("teacher_logprobs", teacher_logprobs)
    student = _finite_vector("student_logprobs", student_logprobs)
    _check_same_length("teacher_logprobs", teacher, "student_logprobs", student)
    if not np.isfinite(beta):
        raise ValueError(f"beta = {beta} must be a finite number")
    delta = teacher - student
    if delta_clip is not None:
        if not delta_clip > 0:
            raise ValueError(f"delta_clip = {delta_clip} must be positive; null switches it off")
        delta = np.clip(delta, -delta_clip, delta_clip)
    return (beta * delta).astype(np.float32)


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
    keep = _mask(loss_mask)
    values = _finite_vector("advantages", advantages)
    log_ratio = _masked_log_ratio(
        "old_logprobs", old_logprobs, "reference_logprobs", reference_logprobs, keep
    )
    _check_same_length("advantages", values, "loss_mask", keep)
    if config.kl_estimator is KLEstimator.k1:
        kl = log_ratio
    elif config.kl_estimator is KLEstimator.k2:
        kl = 0.5 * log_ratio**2
    else:
        kl = np.expm1(np.clip(-log_ratio, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)) + log_ratio
    return (values - config.kl_coefficient * kl).astype(np.float32)


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
    keep = _mask(loss_mask)
    ones = np.ones(len(keep), dtype=np.float32)
    kind = config.mismatch_correction
    if kind is MismatchCorrection.none:
        return ones
    log_ratio = _masked_log_ratio("old_logprobs", old_logprobs, "rollout_logprobs", rollout_logprobs, keep)
    if kind in (MismatchCorrection.tis_sequence, MismatchCorrection.sequence_rejection):
        log_ratio = np.full(len(keep), log_ratio.sum())
    ratio = np.exp(np.clip(log_ratio, -_MAX_LOG_RATIO, _MAX_LOG_RATIO))
    if kind in (MismatchCorrection.tis_token, MismatchCorrection.tis_sequence):
        if not config.mismatch_cap > 0:
            raise ValueError(f"loss.mismatch_cap = {config.mismatch_cap} must be positive (2.0 is usual)")
        factors = np.minimum(ratio, config.mismatch_cap)
    else:
        low, high = _bounds(config)
        within = (ratio >= low) & (ratio <= high)
        factors = np.where(within, ratio if kind is MismatchCorrection.icepop else 1.0, 0.0)
    return np.where(keep, factors, ones).astype(np.float32)


# ------------------------------------------------------------------------------- weights and counts


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
        tokens = int(_mask(row.loss_mask).sum())
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
    masks = [_mask(mask) for mask in response_masks]
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


# -------------------------------------------------------------------------------------------- rows


def native_rows(
    rollouts: Sequence[Rollout],
    config: AdvantageConfig,
    loss: LossConfig,
    max_new_tokens: int,
    *,
    old_logprobs: Sequence[FloatArray] | None = None,
    reference_logprobs: Sequence[FloatArray] | None = None,
) -> list[TrainRow]:
    """GRPO rows of graded rollouts: shaping, group advantages spread over tokens, overlong filtering.

    A group is all rollouts with the same ``prompt_id``; it must be passed as a whole, on one rank.

    Args:
        rollouts: in any order; rows come back in the same order.
        loss: read for the KL term. With ``kl_placement: reward`` and a coefficient, the penalty goes into
            the advantages here and both log-probabilities are needed.
        max_new_tokens: the branch's limit, for overlong shaping.
        old_logprobs: one [R] per rollout under the actor at the start of the step; None: left to the first
            forward pass.
        reference_logprobs: one [R] per rollout under the reference policy; None: not attached.

    Raises:
        ValueError: a rollout has no reward, a reward is not finite, or log-probabilities are missing, of
            the wrong length or not finite.
    """
    olds = _per_rollout("old_logprobs", old_logprobs, rollouts)
    references = _per_rollout("reference_logprobs", reference_logprobs, rollouts)
    kl_in_reward = loss.kl_coefficient != 0 and loss.kl_placement is KLPlacement.reward
    if kl_in_reward and (old_logprobs is None or reference_logprobs is None):
        raise ValueError(
            "loss.kl_placement 'reward' needs old_logprobs and reference_logprobs when rows are built: score "
            "the rollouts with the actor and the reference policy first, or place the KL term in the loss"
        )
    rewards = [
        _reward(rollout)
        + overlong_penalty(rollout.response_length, rollout.truncated, max_new_tokens, config)
        for rollout in rollouts
    ]
    per_response = grpo_advantages(rewards, [rollout.prompt.prompt_id for rollout in rollouts], config)
    rows = []
    for rollout, advantage, old, reference in zip(rollouts, per_response, olds, references, strict=True):
        filtered = config.overlong_filtering and rollout.truncated
        row = _row(rollout, NATIVE, np.full(rollout.response_length, advantage, dtype=np.float32))
        row = replace(row, old_logprobs=old, reference_logprobs=reference)
        if filtered:
            row = replace(row, loss_mask=np.zeros_like(row.loss_mask))
        if kl_in_reward:
            assert old is not None and reference is not None
            penalised = kl_penalised_advantages(row.advantages, old, reference, row.loss_mask, loss)
            row = replace(row, advantages=penalised)
        rows.append(row)
    return rows


def cross_rows(
    rollouts: Sequence[Rollout],
    teacher_logprobs: Sequence[npt.ArrayLike],
    student_logprobs: Sequence[npt.ArrayLike],
    *,
    teacher: str,
    beta: float,
    delta_clip: float | None = None,
) -> list[TrainRow]:
    """OPD rows: the student's own samples on one edge's prompts, with Eq. 8's token advantages.

    Args:
        rollouts: sampled by the student; rewards are not read and may be missing.
        teacher_logprobs: one [R] per rollout, under ``teacher``.
        student_logprobs: one [R] per rollout, under the student's actor at the start of the step; they
            become the rows' ``old_logprobs``.
        teacher: the branch that scored; names the component.
        beta: the edge's strength.
        delta_clip: see ``opd_advantages``.

    Raises:
        ValueError: lengths differ or a log-probability is not finite; names the rollout and the teacher.
    """
    teachers = _per_rollout("teacher_logprobs", teacher_logprobs, rollouts)
    students = _per_rollout("student_logprobs", student_logprobs, rollouts)
    rows = []
    for rollout, theirs, mine in zip(rollouts, teachers, students, strict=True):
        assert theirs is not None and mine is not None
        try:
            advantages = opd_advantages(theirs, mine, beta, delta_clip)
        except ValueError as error:
            raise ValueError(f"{_label(rollout)}, scored by teacher {teacher!r}: {error}") from error
        rows.append(replace(_row(rollout, cross_component(teacher), advantages), old_logprobs=mine))
    return rows


def _row(rollout: Rollout, component: str, advantages: FloatArray) -> TrainRow:
    if len(rollout.rollout_logprobs) != rollout.response_length:
        raise ValueError(
            f"{_label(rollout)}: {len(rollout.rollout_logprobs)} rollout_logprobs for "
            f"{rollout.response_length} response tokens"
        )
    return TrainRow(
        token_ids=rollout.token_ids,
        prompt_length=rollout.prompt_length,
        advantages=advantages,
        loss_mask=np.ones(rollout.response_length, dtype=np.float32),
        component=component,
        rollout_logprobs=rollout.rollout_logprobs,
        weight_version=rollout.weight_version,
        media=rollout.media,
    )


def _reward(rollout: Rollout) -> float:
    if rollout.reward is None or not np.isfinite(rollout.reward):
        raise ValueError(
            f"{_label(rollout)}: reward is {rollout.reward}; native rows need graded rollouts, "
            "so run the verifiers first"
        )
    return float(rollout.reward)


def _per_rollout(
    name: str, arrays: Sequence[npt.ArrayLike] | None, rollouts: Sequence[Rollout]
) -> list[FloatArray | None]:
    """One float32 [R] per rollout, checked; or None for each."""
    if arrays is None:
        return [None] * len(rollouts)
    if len(arrays) != len(rollouts):
        raise ValueError(f"{len(arrays)} {name} for {len(rollouts)} rollouts")
    checked: list[FloatArray | None] = []
    for values, rollout in zip(arrays, rollouts, strict=True):
        array = np.asarray(values, dtype=np.float32)
        if array.shape != (rollout.response_length,):
            raise ValueError(
                f"{_label(rollout)}: {name} has shape {list(array.shape)} for "
                f"{rollout.response_length} response tokens"
            )
        checked.append(array)
    return checked


def _label(rollout: Rollout) -> str:
    return f"rollout {rollout.prompt.prompt_id} #{rollout.sample_index}"


# ------------------------------------------------------------------------------------------ checks


def _grouped(rewards: npt.ArrayLike, group_ids: npt.ArrayLike) -> tuple[Float64Array, npt.NDArray[Any], int]:
    """Rewards [n], the index of each one's group [n], and the number of groups."""
    values = _finite_vector("rewards", rewards)
    groups, index = np.unique(np.asarray(group_ids), return_inverse=True)
    _check_same_length("rewards", values, "group_ids", index)
    return values, index, len(groups)


def _finite_vector(name: str, values: npt.ArrayLike) -> Float64Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional, got shape {list(array.shape)}")
    bad = np.flatnonzero(~np.isfinite(array))
    if len(bad):
        raise ValueError(
            f"{name}: {len(bad)} of {len(array)} values are not finite, the first is {array[bad[0]]} at "
            f"index {bad[0]}; look for diverged weights or for masked logits in what computed them"
        )
    return array


def _mask(mask: npt.ArrayLike) -> BoolArray:
    array = np.asarray(mask)
    if array.ndim != 1 or not np.all((array == 0) | (array == 1)):
        raise ValueError(f"a loss mask must be one-dimensional and hold 0 or 1 only, got {array}")
    return array.astype(bool)


def _masked_log_ratio(
    name_a: str, logprobs_a: npt.ArrayLike, name_b: str, logprobs_b: npt.ArrayLike, keep: BoolArray
) -> Float64Array:
    """log p_a - log p_b, [R], 0 where masked."""
    sides = []
    for name, values in ((name_a, logprobs_a), (name_b, logprobs_b)):
        array = np.asarray(values, dtype=np.float64)
        _check_same_length(name, array, "loss_mask", keep)
        sides.append(_finite_vector(name, np.where(keep, array, 0.0)))
    return sides[0] - sides[1]


def _check_same_length(name_a: str, a: npt.NDArray[Any], name_b: str, b: npt.NDArray[Any]) -> None:
    if a.shape != b.shape:
        raise ValueError(f"{name_a} has shape {list(a.shape)}, {name_b} {list(b.shape)}: they must agree")


def _bounds(config: LossConfig) -> tuple[float, float]:
    bounds = list(config.mismatch_bounds)
    if len(bounds) != 2 or not 0 <= bounds[0] <= bounds[1]:
        raise ValueError(
            f"loss.mismatch_bounds = {bounds} must be [lower, upper] with 0 <= lower <= upper, "
            "such as [0.5, 5.0]"
        )
    return float(bounds[0]), float(bounds[1])
