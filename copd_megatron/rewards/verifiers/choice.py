"""``choice``: multiple choice, answered by letter or by the option's text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from copd_megatron.rewards.final_answer import final_answer, normalize
from copd_megatron.rewards.metadata import setting
from copd_megatron.rewards.registry import register

_LETTER = re.compile(
    r"(?:option|choice)?\s?[(\[]?([a-z])(?:[)\]]|\s?[.:,]|\s[-\u2013\u2014](?=\s)|$)(?:\s|$|(?<=[)\].:,]))",
    re.IGNORECASE,
)


@register("choice", isolated=False, reads_final_answer=True)
def choice(response: str, answer: str, metadata: Mapping[str, Any]) -> float:
    """1.0 if the final answer picks the gold option.

    ``answer`` is the gold letter or the option's text. metadata: ``choices``, the options' texts in order
    (A, B, ...), needed to match text against letters. "B", "(B)", "B. Paris", "B - Paris", "option B" and,
    with ``choices``, "Paris" all pick B. A single letter is always read as a letter, also where the options'
    texts are letters themselves (blood groups, say).

    Raises ValueError if ``answer`` is neither a letter nor one of ``choices``.
    """
    listed: Sequence[object] = setting(metadata, "choices", ())
    choices = [normalize(str(text)) for text in listed]
    gold = _picked(answer, choices)
    if gold is None:
        raise ValueError(f"gold answer {answer[:60]!r} is neither a letter nor one of the choices {choices}.")
    return float(_picked(final_answer(response).text, choices) == gold)


def _picked(text: str, choices: Sequence[str]) -> int | None:
    """Which option a text picks, None where it picks none."""
    normal = normalize(text)
    match = _LETTER.match(normal)
    letter = None if match is None else ord(match.group(1).casefold()) - ord("a")
    if letter is not None and choices and letter >= len(choices):
        letter = None
    is_letter_alone = match is not None and match.end() == len(normal)
    if letter is not None and is_letter_alone:
        return letter
    return choices.index(normal) if normal in choices else letter
