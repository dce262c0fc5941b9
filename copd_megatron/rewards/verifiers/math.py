"""``math``: symbolic equality of the final answer and the gold answer, by math-verify."""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Mapping
from typing import Any

from copd_megatron.rewards.final_answer import FinalAnswer, Source, final_answer, normalize
from copd_megatron.rewards.registry import register

_WORD = re.compile(r"(?<!\\)\b[A-Za-z]{2,}\b")


_TYPICAL = (
    *(r"$\frac{1}{2}$", r"$2\sqrt{3}$", "$x^2+2x+1$", r"$\{1, 2\}$", "$(1, 2)$", r"$[0, \frac{\pi}{2})$"),
    *("$x = 5$", r"$\begin{pmatrix} 1 \\ 2 \end{pmatrix}$", r"$10\%$", "42", "1/2", "$x > 1$"),
)
"""Parsed before the grading processes are forked: its grammar and sympy build their tables at first use,
which takes seconds that every new process would spend again."""


def _prepare() -> None:
    math_verify = importlib.import_module("math_verify")
    # It warns that its own time limit is off; the grader has one.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    for text in _TYPICAL:
        gold = math_verify.parse(text, parsing_timeout=None)
        math_verify.verify(gold, math_verify.parse("$3 + x$", parsing_timeout=None), timeout_seconds=None)


@register("math", isolated=True, reusable=True, prepare=_prepare)
def math(response: str, answer: str, metadata: Mapping[str, Any]) -> float:
    r"""1.0 if the final answer equals the gold answer as mathematics.

    Both may be LaTeX (with or without ``$`` or ``\boxed``) or plain. math-verify's own time limit uses
    SIGALRM, which works on a main thread only and would disturb the trainer's; it is off, and the grader
    limits the time from outside. metadata: ``float_rounding`` (decimals that count, default 6).

    Raises ValueError if the gold answer cannot be parsed.
    """
    found = final_answer(response)
    if not found.text:
        return 0.0
    if normalize(found.text) == normalize(answer) != "":
        return 1.0
    from math_verify import parse, verify  # slow to import, and not needed where the strings agree

    gold = parse(_as_latex(answer), parsing_timeout=None)
    if not gold:
        raise ValueError(f"gold answer {answer[:60]!r} is not a mathematical expression. Use 'exact' for it.")
    guess = parse(_readable(found), parsing_timeout=None)
    rounding = int(metadata.get("float_rounding", 6))
    return float(bool(guess) and verify(gold, guess, float_rounding=rounding, timeout_seconds=None))


def _as_latex(text: str) -> str:
    return text if "$" in text or "\\boxed" in text or "\\[" in text or "\\(" in text else f"${text}$"


def _readable(found: FinalAnswer) -> str:
    """A sentence is left for math-verify to search; anything else is marked as an expression."""
    text = found.text.removesuffix(".")
    is_sentence = found.source in (Source.marker, Source.last_line) and _WORD.search(text) is not None
    return text if is_sentence else _as_latex(text)
