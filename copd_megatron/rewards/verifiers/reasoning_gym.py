"""``reasoning_gym``: scored by the reasoning-gym family that generated the task."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Mapping
from typing import Any

from copd_megatron.rewards.final_answer import Source, final_answer
from copd_megatron.rewards.metadata import setting
from copd_megatron.rewards.reasoning_gym_scores import Score, score
from copd_megatron.rewards.registry import register

_FULL_SCORE = 0.999


def library() -> Any:
    """The reasoning_gym module; takes seconds the first time. A dependency of it has ill-formed code."""
    with warnings.catch_warnings(action="ignore", category=SyntaxWarning):
        return importlib.import_module("reasoning_gym")


def _prepare() -> None:
    library()


@functools.cache
def _scorer(family: str) -> Score:
    scorer: Score = library().get_score_answer_fn(family)
    return scorer


@register("reasoning_gym", isolated=True, reusable=True, reads_final_answer=True, prepare=_prepare)
def reasoning_gym(response: str, answer: str, metadata: Mapping[str, Any]) -> float:
    """The family's own score of the final answer.

    metadata: ``dataset`` (family's name), ``question`` and ``entry`` (the task's question and metadata as
    generated), ``binary`` (default true: 1.0 for a full score of at least 0.999, else 0.0; false: the score
    itself, 0 to 1, with the family's partial credit).

    Raises ValueError for an unknown family or one whose scorer has not been read, KeyError for metadata
    without ``dataset``.
    """
    found = final_answer(response, multiline="\n" in answer.strip())
    if found.source is Source.nothing:
        return 0.0
    entry = {
        "question": setting(metadata, "question", ""),
        "answer": answer,
        "metadata": dict(setting(metadata, "entry", {})),
    }
    value = score(metadata["dataset"], found.text, entry, _scorer)
    return float(value >= _FULL_SCORE) if setting(metadata, "binary", True) else value
