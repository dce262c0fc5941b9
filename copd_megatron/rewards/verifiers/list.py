"""``list``: several items, in order or in any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from copd_megatron.rewards.final_answer import final_answer
from copd_megatron.rewards.metadata import setting
from copd_megatron.rewards.parsing.rows import read_items, same_item
from copd_megatron.rewards.parsing.syntax import NotUnderstoodError
from copd_megatron.rewards.registry import register

_MAX_ITEMS = 1_000


@register("list", isolated=False, reads_final_answer=True)
def list_items(response: str, answer: str, metadata: Mapping[str, Any]) -> float:
    """1.0 if the final answer lists the gold items and no others.

    Both are written ``[1, 2]``, ``1, 2`` or one item a line (``parsing.rows.read_items``). Items are compared
    as numbers, or as text in any case. metadata: ``ordered`` (default true), ``partial`` (default false;
    true: items that are right / items in the longer list where the order counts, and else in the union of
    both, so that listing everything does not pay).

    Raises ValueError if the gold answer lists nothing, or more than 1,000 items.
    """
    gold = read_items(answer)
    if not 0 < len(gold) <= _MAX_ITEMS:
        raise ValueError(f"gold answer {answer[:60]!r} lists no item, or more than {_MAX_ITEMS}.")
    try:
        found = read_items(final_answer(response, multiline=True).text)
    except NotUnderstoodError:
        return 0.0
    partial, ordered = setting(metadata, "partial", False), setting(metadata, "ordered", True)
    if len(found) > _MAX_ITEMS or (len(found) != len(gold) and not partial):
        return 0.0
    if ordered:
        right = sum(same_item(one, other) for one, other in zip(found, gold, strict=False))
        total = max(len(found), len(gold))
    else:
        right = _common(found, gold)
        total = len(found) + len(gold) - right
    return right / total if partial else float(right == total)


def _common(found: Sequence[str], gold: Sequence[str]) -> int:
    """How many items both have, each as often as in both."""
    left = list(gold)
    for item in found:
        place = next((number for number, other in enumerate(left) if same_item(item, other)), None)
        if place is not None:
            left.pop(place)
    return len(gold) - len(left)
