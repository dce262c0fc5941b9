"""``exact``: the final answer is the gold answer, up to what ``normalize`` drops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from copd_megatron.rewards.final_answer import final_answer, normalize
from copd_megatron.rewards.metadata import setting
from copd_megatron.rewards.registry import register


@register("exact", isolated=False, reads_final_answer=True)
def exact(response: str, answer: str, metadata: Mapping[str, Any]) -> float:
    """1.0 if the normalised final answer equals the normalised gold answer.

    metadata: ``case_sensitive`` (default false); ``also``, a list of further gold answers.
    """
    case_sensitive = bool(setting(metadata, "case_sensitive", False))
    found = final_answer(response, multiline="\n" in answer.strip()).text
    further: Sequence[object] = setting(metadata, "also", ())
    golds = {normalize(gold, case_sensitive=case_sensitive) for gold in (answer, *map(str, further))} - {""}
    return float(normalize(found, case_sensitive=case_sensitive) in golds)
