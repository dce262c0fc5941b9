"""``math``: symbolic equality of the final answer and the gold answer, by math-verify."""

from __future__ import annotations

import functools
import importlib
import logging
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from copd_megatron.rewards.final_answer import FinalAnswer, Source, final_answer, normalize
from copd_megatron.rewards.metadata import setting
from copd_megatron.rewards.parsing.magnitude import is_evaluable, is_tall
from copd_megatron.rewards.registry import register

_WORD = re.compile(r"(?<!\\)\b[A-Za-z]{2,}\b")
_BRACES = re.compile(r"[\s{}]")
_INTEGER = re.compile(r"-?[0-9]{1,300}")
_SCIENTIFIC = re.compile(r"(?<![\w.])([0-9]+(?:\.[0-9]+)?)[eE]([+-]?[0-9]{2,3})(?![\w.])")
_OR = re.compile(r"\\text\s?\{\s?or\s?\}|(?<![\w\\])or(?!\w)", re.IGNORECASE)
_LISTED = re.compile(r"[,;(\[]|\\\{|\\cup|\\pm|\\lor|\\text\s?\{\s?(?:or|and)|\b(?:or|and)\b")
_MATHEMATICAL = re.compile(r"\d|\\[A-Za-z]|\b[a-z]\b")
_MAX_CHARACTERS = 4_000
"""Longest final answer that is read; math-verify takes seconds for ten thousand characters."""
_MAX_DEPTH = 50
"""Nested brackets; math-verify takes seconds to see that hundreds of them hold nothing."""
_DIGITS = 30
"""Digits to which two numbers are compared."""


_TYPICAL = (
    *(r"$\frac{1}{2}$", r"$2\sqrt{3}$", "$x^2+2x+1$", r"$\{1, 2\}$", "$(1, 2)$", r"$[0, \frac{\pi}{2})$"),
    *("$x = 5$", r"$\begin{pmatrix} 1 \\ 2 \end{pmatrix}$", r"$10\%$", "42", "1/2", "$x > 1$"),
)
"""Parsed before the grading processes are forked: its grammar and sympy build their tables at first use,
which takes seconds that every new process would spend again."""


def _prepare() -> None:
    # It warns that its own time limit is off; the grader has one.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    for text in _TYPICAL:
        _equals(_parsed(text), FinalAnswer("3 + x", Source.boxed), 6)


@register("math", isolated=True, reusable=True, reads_final_answer=True, prepare=_prepare)
def math(response: str, answer: str, metadata: Mapping[str, Any]) -> float:
    r"""1.0 if the final answer equals the gold answer as mathematics.

    Both may be LaTeX (with or without ``$`` or ``\boxed``) or plain. metadata: ``float_rounding`` (decimals
    that count, default 6; as many significant digits must agree). An answer that offers several values ("1 or
    2") is right if each of them is, or if the gold answer is a list itself.

    Numbers of more than 60,000 digits are not evaluated: towers of powers are equal if they are written
    alike. math-verify's own time limit uses SIGALRM, which works on a main thread only and would disturb the
    trainer's; it is off, and the grader limits the time from outside.

    Raises ValueError if the gold answer cannot be parsed.
    """
    found = _bounded(final_answer(response))
    if not found.text or len(found.text) > _MAX_CHARACTERS or _depth(found.text) > _MAX_DEPTH:
        return 0.0
    normal, normal_gold = normalize(found.text), normalize(answer)
    if normal == normal_gold != "":
        return 1.0
    if _INTEGER.fullmatch(normal) and _INTEGER.fullmatch(normal_gold):
        return float(int(normal) == int(normal_gold))
    if is_tall(normal) or is_tall(normal_gold):
        return float(_BRACES.sub("", normal) == _BRACES.sub("", normal_gold))
    gold = _parsed(_as_latex(_without_e(answer)))
    if not gold:
        raise ValueError(f"gold answer {answer[:60]!r} is not a mathematical expression. Use 'exact' for it.")
    rounding = setting(metadata, "float_rounding", 6)
    return float(all(_equals(gold, offered, int(rounding)) for offered in _offered(found, answer)))


def _bounded(found: FinalAnswer) -> FinalAnswer:
    """The end of a long paragraph; decimal digits of other scripts as 0 to 9, which is all that sympy
    knows."""
    text = found.text[-_MAX_CHARACTERS:] if found.source is Source.last_line else found.text
    if not text.isascii():
        text = "".join(str(unicodedata.decimal(letter, letter)) for letter in text)
    return FinalAnswer(text, found.source)


def _depth(text: str) -> int:
    """How deeply brackets are nested."""
    depth = deepest = 0
    for character in text:
        depth = max(0, depth + (character in "([{") - (character in ")]}"))
        deepest = max(deepest, depth)
    return deepest


def _parsed(text: str) -> list[Any]:
    parsed: list[Any] = _math_verify().parse(text, parsing_timeout=None)
    return parsed


def _equals(gold: Sequence[Any], offered: FinalAnswer, rounding: int) -> bool:
    guesses = _parsed(_readable(offered))
    return any(_same(right, guess, rounding) for right in gold for guess in guesses)


def _same(gold: Any, guess: Any, rounding: int) -> bool:
    """Equality of two parsed expressions, or of two texts that could not be parsed."""
    if not (is_evaluable(gold) and is_evaluable(guess)):
        return bool(gold == guess)
    if not _math_verify().verify(gold, guess, float_rounding=rounding, timeout_seconds=None):
        return False
    return not _far_apart(gold, guess, 5 * 10.0**-rounding)


def _far_apart(gold: Any, guess: Any, tolerance: float) -> bool:
    """Whether two numbers differ by more than a share of the larger: rounding to decimals makes all small
    numbers equal."""
    numbers = [getattr(side, "rhs", side) for side in (gold, guess)]
    if not all(getattr(number, "is_number", False) for number in numbers):
        return False
    if any(part.func.__name__ == "UnevaluatedExpr" for number in numbers for part in _nodes(number)):
        return False  # a percentage, which equals the number with and without its sign
    if not all(number.is_finite for number in numbers):
        return False
    first, second = (_significant(number) for number in numbers)
    size = max(abs(first), abs(second))
    return bool(size > 0 and abs(first - second) > tolerance * size)


def _nodes(number: Any) -> Iterator[Any]:
    yield number
    for part in number.args:
        yield from _nodes(part)


def _significant(number: Any) -> Any:
    """A number's value; 0 where cancellation leaves no digit of it."""
    value = number.evalf(_DIGITS)
    return 0 if getattr(value, "_prec", _DIGITS) == 1 else value


def _offered(found: FinalAnswer, answer: str) -> list[FinalAnswer]:
    """The values that a final answer offers to choose from; the final answer itself where it does not."""
    if _LISTED.search(answer):
        return [found]
    parts = [part.strip(" $,.;") for part in _OR.split(found.text)]
    offered = [FinalAnswer(part, found.source) for part in parts if _MATHEMATICAL.search(part)]
    return offered if len(offered) > 1 else [found]


def _without_e(text: str) -> str:
    """Programs write 1e-05, which LaTeX would read as 1 times e minus 5."""
    return _SCIENTIFIC.sub(r"\1 \\times 10^{\2}", text)


def _as_latex(text: str) -> str:
    return text if "$" in text or "\\boxed" in text or "\\[" in text or "\\(" in text else f"${text}$"


def _readable(found: FinalAnswer) -> str:
    """A sentence is left for math-verify to search; anything else is marked as an expression."""
    text = _without_e(found.text.removesuffix("."))
    is_sentence = found.source in (Source.marker, Source.last_line) and _WORD.search(text) is not None
    return text if is_sentence else _as_latex(text)


@functools.cache
def _math_verify() -> Any:
    """The math_verify module: slow to import, and not needed where the texts agree."""
    return importlib.import_module("math_verify")
