"""On-policy distillation by the sampled token: advantages from a teacher's log-probabilities (Eq. 8).

numpy only; computed in float64, handed over as float32. Shape legend: ``R`` response tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt

from copd_megatron.config.schema import AdvantageConfig, LossConfig
from copd_megatron.objectives.base import Context, Material, ObjectiveFactory, TokenLoss
from copd_megatron.objectives.grpo import grpo_advantages
from copd_megatron.objectives.rows import (
    Float64Array,
    check_same_length,
    finite_vector,
    label_of,
    per_rollout,
    row_of,
)
from copd_megatron.objectives.surrogate import ClippedSurrogate
from copd_megatron.records import Ask, FloatArray, Rollout, TrainRow


@dataclass(frozen=True, kw_only=True)
class SampledToken:
    """The objective of an edge: advantages of Eq. 8 in the clipped surrogate of Eq. 7."""

    teacher: str
    beta: float
    """The edge's strength."""
    delta_clip: float | None
    """Bound on |delta| before it is multiplied by beta; None: no bound."""
    loss: LossConfig
    max_new_tokens: int
    extrapolation: float = 1.0
    """G-OPD's lambda."""
    outcome_weight: float = 0.0
    """MOPD's alpha."""
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    """How the outcome's advantage is normalised."""
    temperature: float = 1.0
    """Factor on the teacher's temperature."""
    asks_own: ClassVar[Ask] = Ask()
    needs_old_logprobs: ClassVar[bool] = True

    @classmethod
    def of(cls, context: Context) -> Self:
        """From the edge, ``opd.delta_clip`` and ``loss``."""
        assert context.edge is not None, "sampled_token is the objective of an edge"
        return cls(
            teacher=context.edge.teacher,
            beta=context.edge.beta,
            delta_clip=context.config.opd.delta_clip,
            loss=context.config.loss,
            max_new_tokens=context.settings.rollout.max_new_tokens,
            extrapolation=context.config.opd.extrapolation,
            outcome_weight=context.config.opd.outcome_weight,
            advantage=context.config.advantage,
            temperature=context.config.opd.teacher_temperature,
        )

    @property
    def asks(self) -> Ask:
        """The log-probability of every sampled token."""
        return Ask(tokens=True, temperature=self.temperature)

    def rows(self, material: Material) -> list[TrainRow]:
        """See ``cross_rows``."""
        if material.teacher_logprobs is None or material.old_logprobs is None:
            raise ValueError(
                f"{material.component}: Eq. 8 needs the log-probabilities of teacher and student; score the "
                "rollouts with both before making rows"
            )
        rows = cross_rows(
            material.rollouts,
            self._targets(material, material.teacher_logprobs),
            material.old_logprobs,
            component=material.component,
            teacher=self.teacher,
            beta=self.beta,
            delta_clip=self.delta_clip,
        )
        return self._with_outcomes(rows, material.rollouts) if self.outcome_weight else rows

    def _targets(self, material: Material, teacher: Sequence[FloatArray]) -> Sequence[npt.ArrayLike]:
        """[R] log-probabilities that the student is drawn to: the teacher's, extrapolated and shifted."""
        targets: Sequence[npt.ArrayLike] = teacher
        if self.extrapolation != 1:
            if material.reference_logprobs is None:
                raise ValueError(
                    f"{material.component}: extrapolation needs the base model's log-probabilities"
                )
            targets = [
                extrapolated(theirs, base, self.extrapolation)
                for theirs, base in zip(teacher, material.reference_logprobs, strict=True)
            ]
        if material.shift is None:
            return targets
        return [np.asarray(t, dtype=np.float64) + s for t, s in zip(targets, material.shift, strict=True)]

    def _with_outcomes(self, rows: Sequence[TrainRow], rollouts: Sequence[Rollout]) -> list[TrainRow]:
        """Adds alpha x the group-relative advantage of each response's reward (MOPD). A response without a
        grade has none."""
        graded = [i for i, rollout in enumerate(rollouts) if rollout.reward is not None]
        rewards = [reward for rollout in rollouts if (reward := rollout.reward) is not None]
        groups = [rollouts[i].prompt.group_id for i in graded]
        outcome = np.zeros(len(rows), dtype=np.float32)
        if graded:
            outcome[graded] = grpo_advantages(rewards, groups, self.advantage)
        return [
            replace(row, advantages=row.advantages + np.float32(self.outcome_weight) * value)
            for row, value in zip(rows, outcome, strict=True)
        ]

    def token_loss(self) -> TokenLoss:
        """The clipped surrogate."""
        return ClippedSurrogate(self.loss, self.max_new_tokens)


OBJECTIVE: ObjectiveFactory = SampledToken


def extrapolated(
    teacher_logprobs: npt.ArrayLike, base_logprobs: npt.ArrayLike, factor: float
) -> Float64Array:
    """[R] lambda log pi_teacher + (1 - lambda) log pi_base, the target of G-OPD. 1 gives the teacher's."""
    teacher = finite_vector("teacher_logprobs", teacher_logprobs)
    base = finite_vector("base_logprobs", base_logprobs)
    check_same_length("teacher_logprobs", teacher, "base_logprobs", base)
    return factor * teacher + (1.0 - factor) * base


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
    teacher = finite_vector("teacher_logprobs", teacher_logprobs)
    student = finite_vector("student_logprobs", student_logprobs)
    check_same_length("teacher_logprobs", teacher, "student_logprobs", student)
    if not np.isfinite(beta):
        raise ValueError(f"beta = {beta} must be a finite number")
    delta = teacher - student
    if delta_clip is not None:
        if not delta_clip > 0:
            raise ValueError(f"delta_clip = {delta_clip} must be positive; null switches it off")
        delta = np.clip(delta, -delta_clip, delta_clip)
    return (beta * delta).astype(np.float32)


def cross_rows(
    rollouts: Sequence[Rollout],
    teacher_logprobs: Sequence[npt.ArrayLike],
    student_logprobs: Sequence[npt.ArrayLike],
    *,
    component: str,
    teacher: str,
    beta: float,
    delta_clip: float | None = None,
) -> list[TrainRow]:
    """OPD rows: the student's own samples on one edge's prompts, with Eq. 8's token advantages.

    Args:
        rollouts: sampled by the student; rewards are not read and may be missing.
        teacher_logprobs: one [R] per rollout, under ``teacher``.
        student_logprobs: one [R] per rollout, under the student's actor as it sampled them; they become the
            rows' ``old_logprobs``.
        component: name that the rows get.
        teacher: the branch that scored, for messages.
        beta: the edge's strength.
        delta_clip: see ``opd_advantages``.

    Raises:
        ValueError: lengths differ or a log-probability is not finite; names the rollout and the teacher.
    """
    teachers = per_rollout("teacher_logprobs", teacher_logprobs, rollouts)
    students = per_rollout("student_logprobs", student_logprobs, rollouts)
    rows = []
    for rollout, theirs, mine in zip(rollouts, teachers, students, strict=True):
        assert theirs is not None and mine is not None
        try:
            advantages = opd_advantages(theirs, mine, beta, delta_clip)
        except ValueError as error:
            raise ValueError(f"{label_of(rollout)}, scored by teacher {teacher!r}: {error}") from error
        rows.append(replace(row_of(rollout, component, advantages), old_logprobs=mine))
    return rows
