"""On-policy distillation by the sampled token: advantages from a teacher's log-probabilities (Eq. 8).

numpy only; computed in float64, handed over as float32. Shape legend: ``R`` response tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from copd_megatron.objectives.rows import _check_same_length, _finite_vector, _label, _per_rollout, _row
from copd_megatron.records import FloatArray, Rollout, TrainRow


def cross_component(teacher: str) -> str:
    """Component name of the rows that ``teacher`` scored."""
    return f"cross:{teacher}"


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
