"""``choice``: multiple choice, answered by letter or by the option's text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from copd_megatron.rewards.final_answer import final_answer, normalize
from copd_megatron.rewards.registry import register

_LETTER = re.compile(
    r"^(?:option|choice)?\s*[(\[]?([a-z])(?:[)\]]|[.:]|$)(?:\s|$|(?<=[)\].:]))", re.IGNORECASE
)


@register("choice", isolated=False)
def choice(response: str, answer: str, metadata: Mapping[str, Any]) -> float:
    """1.0 if the final answer picks the gold option.

    ``answer`` is the gold letter or the option's text. metadata: ``choices``, the options' texts in order
    (A, B, ...), needed to match text against letters. "B", "(B)", "B. Paris", "option B" and, with
    ``choices``, "Paris" all pick B.

    Raises ValueError if ``answer`` is neither a letter nor one of ``choices``.
    """
    choices = [normalize(str(text)) for text in metadata.get("choices", ())]
    gold = _picked(answer, choices)
    if gold is None:
        raise ValueError(f"gold answer {answer[:60]!r} is neither a letter nor one of the choices {choices}.")
    return float(_picked(final_answer(response).text, choices) == gold)


def _picked(text: str, choices: list[str]) -> int | None:
    normal = normalize(text)
    if normal in choices:
        return choices.index(normal)
    match = _LETTER.match(normal)
    if match is None:
        return None
    index = ord(match.group(1).lower()) - ord("a")
    return None if choices and index >= len(choices) else index
