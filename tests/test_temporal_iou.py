"""Time intervals: written in many ways, graded by overlap."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from copd_megatron.rewards import registry
from copd_megatron.rewards.verifiers.temporal_iou import interval_iou, last_interval, temporal_iou


@pytest.mark.parametrize(
    ("text", "interval"),
    [
        ("1.5-3.0", (1.5, 3.0)),
        ("1.5 - 3", (1.5, 3.0)),
        ("from 1.5 to 3.0 seconds", (1.5, 3.0)),
        ("1.5s to 3s", (1.5, 3.0)),
        ("[1.5, 3.0]", (1.5, 3.0)),
        ("between 0.5 and 2", (0.5, 2.0)),
        ("00:12 \u2013 01:02.5", (12.0, 62.5)),
        ("1:00:01-1:00:03", (3601.0, 3603.0)),
        ("not 1-2 but 3-4", (3.0, 4.0)),
        ('{"start": 1.5, "end": 3.0}', (1.5, 3.0)),
        ('{"start_time": "00:01.5", "end_time": "00:03"}', (1.5, 3.0)),
        ("start: 1.5 s, end: 3.0 s", (1.5, 3.0)),
        ("1-2, or rather start = 3, end = 4", (3.0, 4.0)),
        ("3.0", None),
        ("later", None),
    ],
)
def test_intervals_are_read(text: str, interval: tuple[float, float] | None) -> None:
    assert last_interval(text) == interval


@pytest.mark.parametrize(
    ("response", "metadata", "reward"),
    [
        ("It moves.\nAnswer: 1.0-3.0", {}, 1.0),
        ("2.0-4.0", {}, 1 / 3),
        ("<answer>1.0 to 2.0</answer>", {}, 0.5),
        ("4-5", {}, 0.0),
        ("3-1", {}, 0.0),
        ("no idea", {}, 0.0),
        ("1.0-2.0", {"iou_threshold": 0.5}, 1.0),
        ("1.0-1.9", {"iou_threshold": 0.5}, 0.0),
    ],
)
def test_rewards(response: str, metadata: dict[str, Any], reward: float) -> None:
    assert registry.get("temporal_iou").verify(response, "1.0-3.0", metadata) == pytest.approx(reward)


@pytest.mark.parametrize("answer", ["soon", "3.0", "3-1", "2-2"])
def test_bad_gold_is_an_error(answer: str) -> None:
    with pytest.raises(ValueError, match="no time interval"):
        temporal_iou("1-2", answer, {})


_POINT = st.floats(0, 100)


@given(_POINT, _POINT, _POINT, _POINT)
def test_overlap_is_symmetric_and_bounded(a: float, b: float, c: float, d: float) -> None:
    first, second = (min(a, b), max(a, b)), (min(c, d), max(c, d))
    overlap = interval_iou(first, second)
    assert 0.0 <= overlap <= 1.0
    assert overlap == interval_iou(second, first)
    assert interval_iou(first, first) == 1.0
