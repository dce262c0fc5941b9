"""``point``: where something is in an image, answered with a point."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from copd_megatron.rewards.final_answer import final_answer
from copd_megatron.rewards.metadata import setting
from copd_megatron.rewards.registry import register
from copd_megatron.rewards.verifiers.box_iou import last_box

Point = tuple[float, float]

_NUMBER = r"\s{0,3}(-?\d{1,9}(?:\.\d{1,9})?)\s{0,3}"
_BRACKETS = re.compile(rf"[\[(]{_NUMBER},{_NUMBER}[\])]")
_NAMED = re.compile(
    rf"\bx[\"']?\s?[:=]\s?[\"']?{_NUMBER}[\"']?\s?,?\s?[\"']?y[\"']?\s?[:=]\s?[\"']?{_NUMBER}"
)
_BARE = re.compile(rf"{_NUMBER},{_NUMBER}")
_SCALES = {"same": None, "thousandths": 1000.0, "percent": 100.0, "fraction": 1.0}


@register("point", isolated=False, reads_final_answer=True, gold_is_a_response=False)
def point(response: str, answer: str, metadata: Mapping[str, Any]) -> float:
    """1.0 if the answered point lies in the gold box, or near the gold point.

    ``answer``: a box ``[x1, y1, x2, y2]`` (its edges belong to it) or a point ``[x, y]``. The final answer
    holds one point: ``[x, y]``, ``(x, y)``, ``x, y``, ``{"point_2d": [x, y]}`` or ``x="..." y="..."``.
    Several different ones score 0. metadata: ``scale``, the unit of the response's coordinates: ``same`` as
    the gold answer's (default), or ``thousandths`` (as Qwen-VL models write), ``percent`` or ``fraction`` of
    the image, whose size in the gold answer's unit is then ``image_size`` ([width, height]). For a gold
    point: ``max_distance``, in the gold answer's unit, and ``partial`` (default false; true: the reward falls
    from 1 at the point to 0 at that distance).

    Raises ValueError for a gold answer that is neither, and for settings that do not fit.
    """
    box, target = last_box(answer), None
    if box is None:
        target = one_point(answer)
        if target is None:
            raise ValueError(f"gold answer {answer[:60]!r} is neither [x1, y1, x2, y2] nor [x, y].")
    factors, reach = _factors(metadata), None if target is None else _reach(metadata)
    found = one_point(final_answer(response).text)
    if found is None:
        return 0.0
    x, y = found[0] * factors[0], found[1] * factors[1]
    if box is not None:
        return float(box[0] <= x <= box[2] and box[1] <= y <= box[3])
    assert target is not None and reach is not None
    distance = math.hypot(x - target[0], y - target[1])
    if setting(metadata, "partial", False):
        return max(0.0, 1.0 - distance / reach)
    return float(distance <= reach)


def one_point(text: str) -> Point | None:
    """The point that a text names; None where it names none, or several different ones."""
    bare = _BARE.fullmatch(text.strip())
    matches = [bare] if bare is not None else [*_BRACKETS.finditer(text), *_NAMED.finditer(text)]
    points = {(float(match[1]), float(match[2])) for match in matches}
    return points.pop() if len(points) == 1 else None


def _reach(metadata: Mapping[str, Any]) -> float:
    reach = setting(metadata, "max_distance", None)
    if not isinstance(reach, int | float) or not 0 < reach < math.inf:
        raise ValueError(f"a gold point needs metadata max_distance above 0, not {reach!r:.60}.")
    return float(reach)


def _factors(metadata: Mapping[str, Any]) -> Point:
    """What the response's coordinates are multiplied by."""
    scale = setting(metadata, "scale", "same")
    if scale not in list(_SCALES):
        raise ValueError(f"scale {scale!r:.60} of verifier 'point' is none of {', '.join(_SCALES)}.")
    whole = _SCALES[scale]
    if whole is None:
        return 1.0, 1.0
    size = setting(metadata, "image_size", None)
    if (
        not isinstance(size, Sequence)
        or len(size) != 2
        or not all(isinstance(length, int | float) and 0 < length < math.inf for length in size)
    ):
        raise ValueError(
            f"scale {scale} of verifier 'point' needs image_size [width, height], not {size!r:.60}."
        )
    return size[0] / whole, size[1] / whole
