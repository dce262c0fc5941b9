"""``box_iou``: where something is in an image, graded by the overlap of boxes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from copd_megatron.rewards.final_answer import final_answer
from copd_megatron.rewards.metadata import setting
from copd_megatron.rewards.registry import register

Box = tuple[float, float, float, float]
"""x1, y1, x2, y2"""

_NUMBER = r"\s{0,3}(-?\d{1,9}(?:\.\d{1,9})?)\s{0,3}"
_BOX = re.compile(r"[\[(]" + ",".join([_NUMBER] * 4) + r"[\])]")


@register("box_iou", isolated=False, reads_final_answer=True)
def box_iou(response: str, answer: str, metadata: Mapping[str, Any]) -> float:
    """Overlap of the answered box with the gold one: area of intersection / area of union.

    Boxes are written ``[x1, y1, x2, y2]``, in whatever unit the gold box has; the last one of the final
    answer counts. metadata: ``iou_threshold``; if given, the reward is 1.0 from that overlap on, else 0.0.

    Raises ValueError if the gold answer holds no box of positive area.
    """
    gold = last_box(answer)
    if gold is None or _area(gold) == 0:
        raise ValueError(f"gold answer {answer[:60]!r} holds no box [x1, y1, x2, y2] of positive area.")
    found = last_box(final_answer(response).text)
    if found is None:
        return 0.0
    overlap = iou(found, gold)
    threshold = setting(metadata, "iou_threshold", None)
    return overlap if threshold is None else float(overlap >= float(threshold))


def iou(first: Box, second: Box) -> float:
    """Intersection over union of two boxes; 0 where both are empty."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    intersection = max(0.0, width) * max(0.0, height)
    union = _area(first) + _area(second) - intersection
    return intersection / union if union > 0 else 0.0


def last_box(text: str) -> Box | None:
    """The last box written in the text; None without one."""
    matches = list(_BOX.finditer(text))
    if not matches:
        return None
    x1, y1, x2, y2 = (float(number) for number in matches[-1].groups())
    return x1, y1, x2, y2


def _area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])
