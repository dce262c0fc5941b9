"""``grid``: a table of numbers or symbols, cell by cell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from copd_megatron.rewards.final_answer import final_answer
from copd_megatron.rewards.metadata import setting
from copd_megatron.rewards.parsing.rows import read_grid, same_item
from copd_megatron.rewards.parsing.syntax import NotUnderstoodError
from copd_megatron.rewards.registry import register


@register("grid", isolated=False, reads_final_answer=True)
def grid(response: str, answer: str, metadata: Mapping[str, Any]) -> float:
    """1.0 if the final answer is the gold grid.

    Both are written ``[[1, 2], [3, 4]]`` or in lines (``parsing.rows.read_grid``). Cells are compared as
    numbers, or as text in any case. metadata: ``partial`` (default false; true: the share of cells that are
    right; a grid of another shape scores 0).

    Raises ValueError if the gold answer is no grid.
    """
    gold = read_grid(answer)
    try:
        found = read_grid(final_answer(response, multiline=True).text)
    except NotUnderstoodError:
        return 0.0
    if len(found) != len(gold) or len(found[0]) != len(gold[0]):
        return 0.0
    right = [
        same_item(cell, wanted)
        for row, line in zip(found, gold, strict=True)
        for cell, wanted in zip(row, line, strict=True)
    ]
    return sum(right) / len(right) if setting(metadata, "partial", False) else float(all(right))
