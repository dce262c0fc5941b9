"""``math``: equality of the final answer and the gold answer as mathematics."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from copd_megatron.rewards.final_answer import FinalAnswer, Source, adjacent_boxes, final_answer, normalize
from copd_megatron.rewards.mathematics.compare import Comparison, TooMuchWorkError
from copd_megatron.rewards.mathematics.extract import answer_text
from copd_megatron.rewards.mathematics.notation import canonical
from copd_megatron.rewards.mathematics.scalars import (
    UnreadableScalarError,
    bare,
    expression,
    forget,
    is_unevaluated,
    number,
)
from copd_megatron.rewards.mathematics.shapes import Items, Scalar, Shape, UnreadableError, Words, read
from copd_megatron.rewards.metadata import setting
from copd_megatron.rewards.parsing.magnitude import is_tall
from copd_megatron.rewards.registry import register

_LETTER = re.compile(r"\(?\s*([A-J])\s*(?:[).:]|$)")
_MAX_CHARACTERS = 4_000
"""Longest final answer that is read."""
_MAX_DEPTH = 25
"""Nested brackets; the parser takes a tenth of a second for each."""
_SLOW = re.compile(
    r"[\^_\u00b2\u00b3\u00b9\u2070-\u209c]|\\(?:sin|cos|tan|cot|sec|csc|arc|log|ln|exp|lim|sum|prod|int)"
)
_MAX_SLOW = 150
"""Powers, indices and functions, which take the parser some hundredths of a second each."""
_MAX_BARS = 24
"""Bars, of which the parser tries every pairing."""
_TYPICAL = (
    *(r"\frac{1}{2}\sqrt{3}", "x^{2}+2x+1", r"2\pi", r"\sin(x)+\log_2(8)", "|x-1|", r"\binom{5}{2}", "3!"),
    *(r"e^{2}", r"\sqrt[3]{2}", "(x+1)(x-1)", "1+2i"),
)
"""Parsed before the grading processes are forked: the grammar and sympy build their tables at first use,
which takes seconds that every new process would spend again."""


def _prepare() -> None:
    for text in _TYPICAL:
        expression(text)
    forget()
    for gold, found in ((r"(-\infty,3]", r"x \le 3"), (r"\sqrt{8}", r"2\sqrt{2}"), ("(x+1)^2", "x^2+2x+1")):
        math(rf"\boxed{{{found}}}", gold, {})


@register("math", isolated=True, reusable=True, reads_final_answer=True, prepare=_prepare)
def math(response: str, answer: str, metadata: Mapping[str, Any]) -> float:
    r"""1.0 if the final answer equals the gold answer as mathematics.

    Both may be LaTeX (with or without ``$`` or ``\boxed``) or plain: numbers, formulas, lists in any order,
    sets, tuples, intervals and solved inequalities, matrices, equations, words. Units are compared where both
    sides have one, and converted; a percentage equals the number with and without its sign. An answer with a
    decimal point must agree to ``float_rounding`` decimals and significant digits (metadata; default 6).

    Refused: several values where the gold answer is one ("1 or 2", two boxes side by side), a sentence that
    breaks off, denies or doubts, arithmetic left undone where the gold answer is a number (``6 \cdot 7``),
    and with ``question`` in the metadata, a formula that merely repeats a part of the question. What is not
    understood as a whole scores 0, and so does what no answer needs: hundreds of powers and functions, or
    dozens of nested brackets, or sets of sets that take tens of thousands of comparisons. Numbers of more
    than 60,000 digits are not evaluated.

    Raises ValueError if the gold answer cannot be read.
    """
    found = _final(response)
    written = answer_text(found)
    if not written or len(written) > _MAX_CHARACTERS:
        return 0.0
    gold = _gold(answer)
    if normalize(written, case_sensitive=True) == normalize(answer, case_sensitive=True) != "":
        return 1.0
    if _is_costly(written):
        return 0.0
    text = canonical(written)
    if is_tall(text) or is_tall(canonical(answer)):
        return float(bare(text) == bare(canonical(answer)))
    if _repeats_question(text, metadata):
        return 0.0
    try:
        rounding = int(setting(metadata, "float_rounding", 6))
        return float(_is_letter(gold, text) or Comparison(rounding).same(gold, read(text)))
    except (UnreadableError, UnreadableScalarError, TooMuchWorkError, ZeroDivisionError, RecursionError):
        return 0.0


def _final(response: str) -> FinalAnswer:
    """The final answer, with boxes side by side as one list, and the end of a long paragraph."""
    boxes = adjacent_boxes(response)
    if len(boxes) > 1:
        return FinalAnswer(", ".join(boxes), Source.boxed)
    found = final_answer(response)
    text = found.text[-_MAX_CHARACTERS:] if found.source is Source.last_line else found.text
    return FinalAnswer(text, found.source)


def _is_costly(text: str) -> bool:
    """Whether a text would take the parser many seconds, which no answer needs."""
    is_wide = len(_SLOW.findall(text)) > _MAX_SLOW or text.count("|") > _MAX_BARS
    return is_wide or _depth(text) > _MAX_DEPTH


def _depth(text: str) -> int:
    """How deeply brackets are nested."""
    depth = deepest = 0
    for character in text:
        depth = max(0, depth + (character in "([{") - (character in ")]}"))
        deepest = max(deepest, depth)
    return deepest


def _gold(answer: str) -> Shape:
    """The gold answer's structure. Raises ValueError where it has none, or an expression in it is none."""
    boxed = final_answer(answer)
    text = boxed.text if boxed.source is Source.boxed else answer
    try:
        shape = read(canonical(text))
        for part in shape.items if isinstance(shape, Items) else (shape,):
            if isinstance(part, Scalar) and not is_tall(part.text):
                _check_readable(part.text)
    except (UnreadableError, UnreadableScalarError, ZeroDivisionError) as error:
        raise ValueError(
            f"gold answer {answer[:60]!r} is not a mathematical expression ({error}). Use 'exact' for it."
        ) from error
    return shape


def _check_readable(text: str) -> None:
    """Raises UnreadableScalarError for a text that is neither a number nor an expression."""
    if number(text) is None and text.replace(" ", "") not in (r"\mathbb{R}", r"\mathbb{Z}", r"\emptyset"):
        expression(text)


def _is_letter(gold: Shape, text: str) -> bool:
    """Whether the gold answer is the letter of an option and the response picks it: "(C)", "C: 12"."""
    letter = gold.text.strip("() ") if isinstance(gold, Scalar | Words) else ""
    if not re.fullmatch("[A-J]", letter):
        return False
    picked = _LETTER.match(re.sub(r"\\text\{([^{}]*)\}", r"\1", text).strip())
    return picked is not None and picked.group(1) == letter


def _repeats_question(text: str, metadata: Mapping[str, Any]) -> bool:
    question = setting(metadata, "question", "")
    if not question or not isinstance(question, str) or not is_unevaluated(text):
        return False
    return re.sub(r"\s", "", text) in re.sub(r"\s", "", canonical(question))
