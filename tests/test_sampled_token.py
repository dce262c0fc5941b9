"""``objectives.sampled_token`` against Eq. 8 in plain loops."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from copd_megatron.objectives.sampled_token import cross_rows, opd_advantages
from tests.support.rows import make_rollout

finite = st.floats(-30, 0, allow_nan=False)


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
