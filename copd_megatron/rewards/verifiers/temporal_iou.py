"""``temporal_iou``: when something happens in a video, graded by the overlap of time intervals."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from copd_megatron.rewards.final_answer import final_answer
from copd_megatron.rewards.metadata import setting
from copd_megatron.rewards.registry import register

_TIME = r"(\d{1,9}(?::\d{1,2}){0,2}(?:\.\d{1,9})?)"
_INTERVAL = re.compile(
    _TIME
    + r"\s{0,3}(?:seconds?|secs?|s)?\s{0,3}(?:-|\u2013|\u2014|,|to|until|and)\s{0,3}"
    + _TIME
    + r"(?![\d:])",
    re.IGNORECASE,
)

_LABELLED = re.compile(
    r"\bstart(?:[ _]?time)?[\"']?\s{0,3}[:=]?\s{0,3}[\"']?" + _TIME + r"[\"']?\s{0,3}(?:seconds?|secs?|s)?"
    r"[,;]?\s{1,10}(?:and\s)?[\"']?end(?:[ _]?time)?[\"']?\s{0,3}[:=]?\s{0,3}[\"']?" + _TIME + r"(?![\d:])",
    re.IGNORECASE,
)
"""``{"start": 1.5, "end": 3.0}``, ``start: 1.5, end: 3.0``"""


@register("temporal_iou", isolated=False, reads_final_answer=True)
def temporal_iou(response: str, answer: str, metadata: Mapping[str, Any]) -> float:
    """Overlap of the answered interval with the gold one: length of intersection / length of union.

    ``answer``: "1.5-3.0", in seconds or as ``minutes:seconds``. metadata: ``iou_threshold``; if given, the
    reward is 1.0 from that overlap on and 0.0 below it. The response's final answer may be written "1.5-3.0",
    "1.5 to 3.0 seconds", "[1.5, 3.0]", "00:01.5 - 00:03" or as JSON with ``start`` and ``end``; its last
    interval counts. An interval that ends before it begins scores 0.

    Raises ValueError if the gold answer holds no interval of positive length.
    """
    gold = last_interval(answer)
    if gold is None or gold[1] <= gold[0]:
        raise ValueError(f"gold answer {answer[:60]!r} holds no time interval such as '1.5-3.0'.")
    found = last_interval(final_answer(response).text)
    if found is None:
        return 0.0
    overlap = interval_iou(found, gold)
    threshold = setting(metadata, "iou_threshold", None)
    return overlap if threshold is None else float(overlap >= float(threshold))


def interval_iou(first: tuple[float, float], second: tuple[float, float]) -> float:
    """Intersection over union of two intervals (start, end); 0 where one ends before it begins."""
    if first[1] < first[0] or second[1] < second[0]:
        return 0.0
    intersection = max(0.0, min(first[1], second[1]) - max(first[0], second[0]))
    union = max(first[1], second[1]) - min(first[0], second[0])
    if union == 0:  # the same instant
        return 1.0
    # Where they do not meet, the span between them belongs to no one, but the quotient is 0 all the same.
    return intersection / union


def last_interval(text: str) -> tuple[float, float] | None:
    """The last interval written in the text, in seconds; None without one."""
    matches = [*_INTERVAL.finditer(text), *_LABELLED.finditer(text)]
    if not matches:
        return None
    start, end = max(matches, key=lambda match: match.end()).groups()
    return _seconds(start), _seconds(end)


def _seconds(written: str) -> float:
    seconds = 0.0
    for part in written.split(":"):
        seconds = seconds * 60 + float(part)
    return seconds
