"""``reasoning_gym``: scored by the reasoning-gym family that generated the task."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from copd_megatron.rewards.final_answer import final_answer
from copd_megatron.rewards.registry import register

_FULL_SCORE = 0.999


def library() -> Any:
    """The reasoning_gym module; takes seconds the first time. A dependency of it has ill-formed code."""
    with warnings.catch_warnings(action="ignore", category=SyntaxWarning):
        return importlib.import_module("reasoning_gym")


def _prepare() -> None:
    library()


@functools.cache
def _scorer(family: str) -> Callable[[str, dict[str, Any]], float]:
    scorer: Callable[[str, dict[str, Any]], float] = library().get_score_answer_fn(family)
    return scorer


@register("reasoning_gym", isolated=True, prepare=_prepare)
def reasoning_gym(response: str, answer: str, metadata: Mapping[str, Any]) -> float:
    """The family's own score of the final answer.

    metadata: ``dataset`` (family's name), ``question`` and ``entry`` (the task's question and metadata as
    generated), ``binary`` (default true: 1.0 for a full score of at least 0.999, else 0.0; false: the score
    itself, 0 to 1, with the family's partial credit).

    Raises ValueError for an unknown family, KeyError for metadata without ``dataset``.
    """
    family = metadata["dataset"]
    found = final_answer(response, multiline="\n" in answer.strip()).text
    entry = {
        "question": metadata.get("question", ""),
        "answer": answer,
        "metadata": dict(metadata.get("entry", {})),
    }
    score = float(_scorer(family)(found, entry))
    return float(score >= _FULL_SCORE) if metadata.get("binary", True) else score
