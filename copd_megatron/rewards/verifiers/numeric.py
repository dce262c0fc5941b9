"""``numeric``: the final answer is the gold number, within a tolerance."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from copd_megatron.rewards.final_answer import final_answer, normalize
from copd_megatron.rewards.metadata import setting
from copd_megatron.rewards.registry import register

# Groups: sign, number with optional thousands separators, exponent, and the denominator of a fraction.
_NUMBER = re.compile(
    r"(?<![\w.])([+-]?)((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)([eE][+-]?\d+)?(?:\s?/\s?(\d+))?(?![\d])"
)
_MAX_DIGITS = 400
_DEFAULT_REL_TOL = 1e-9


def _mixed(match: re.Match[str]) -> str:
    """Two and a half, as one fraction."""
    whole, numerator, denominator = (int(group) for group in match.groups())
    return f"{whole * denominator + numerator}/{denominator}"


_DIGITS = r"\s{0,3}(\d{1,400})\s{0,3}"
_POWER = r"\s?(?:\^|\*\*)\s?\{?\s?([+-]?\d{1,9})\s?\}?"
_UNIT = r"\b(?:[mck]?m|dm|s|ft|in|yd|mi|units?|inch(?:es)?|feet|met(?:er|re)s?|seconds?)"
_REWRITTEN = (
    (re.compile(r"\\(?:left|right|displaystyle|quad|qquad)(?![A-Za-z])|\\[,;!:]"), ""),
    (re.compile(r"(?<=\d)(?:\{,\}|~)(?=\d{3})"), ""),  # thousands
    (re.compile(r"\\([$%#&])"), r"\1"),
    (re.compile(r"\\(?:text|mathrm|mathbf|textbf|mbox)\s?\{([^{}]{0,200})\}"), r" \1 "),
    (re.compile(r"\^\s?(?:\\circ|\{\s?\\circ\s?\})(?![A-Za-z])|\\degree(?![A-Za-z])"), ""),
    (re.compile(r"(" + _UNIT + r")\s?\^\s?\{?-?[123]\}?"), r"\1"),
    (re.compile(r"\^\s?\{?\s?(?:\\text\s?\{)?(?:st|nd|rd|th)\b\}{0,2}"), ""),
    (re.compile(r"(?<![\d.])(\d{1,9})\s?\\[dt]?frac\s?\{" + _DIGITS + r"\}\s?\{" + _DIGITS + r"\}"), _mixed),
    (re.compile(r"\\[dt]?frac\s?\{" + _DIGITS + r"\}\s?\{" + _DIGITS + r"\}"), r"\1/\2"),
    (re.compile(r"\\[dt]?frac\s?(\d)\s?(\d)"), r"\1/\2"),
    (re.compile(r"(?<=\d)\s?(?:\\times|\\cdot|\u00d7|\u00b7|\*)\s?10" + _POWER), r"e\1"),
    (re.compile(r"(?<![\w.^{])10" + _POWER), r"1e\1"),
)
"""LaTeX that is part of a number, and what ``_NUMBER`` understands in its place."""
_PART_BEFORE = re.compile(
    r"(?:[\^_]\s?\{?\s?|[\^_]\{[^{}]{0,40}\}\s?|\\[A-Za-z]+\s?(?:\[[^\[\]]{0,40}\])?[{(]?\s?|[^\s\d$]/)$"
)
_PART_AFTER = re.compile(r"\s?(?:\^|!|\*\*|\\[A-Za-z])")
"""What a number stands beside where it is only part of a formula: an exponent, a root's radicand, a
factor."""


@register("numeric", isolated=False, reads_final_answer=True)
def numeric(response: str, answer: str, metadata: Mapping[str, Any]) -> float:
    r"""1.0 if the last number of the final answer equals the gold number.

    Two integers must be equal unless metadata gives a tolerance; other numbers may differ by max(rel_tol *
    larger magnitude, abs_tol). metadata: ``rel_tol`` (default 1e-9), ``abs_tol`` (0). Understood: 1,234.5,
    -3/4, 2.5e-3, ``\frac{3}{4}``, ``3 \times 10^5``, a unit or sign of currency or percent beside the number
    (ignored). A number that is part of a formula (the 2 of ``\sqrt{2}``) is not an answer.

    Raises ValueError if the gold answer holds no number, or a tolerance is none.
    """
    gold = last_number(answer)
    if gold is None:
        raise ValueError(f"gold answer {answer[:60]!r} holds no number. Use the verifier 'exact' for it.")
    found = last_number(final_answer(response).text)
    if found is None:
        return 0.0
    has_tolerance = any(setting(metadata, name, None) is not None for name in ("rel_tol", "abs_tol"))
    if isinstance(gold, int) and isinstance(found, int) and not has_tolerance:
        return float(gold == found)
    rel_tol = float(setting(metadata, "rel_tol", _DEFAULT_REL_TOL))
    abs_tol = float(setting(metadata, "abs_tol", 0.0))
    if not (0 <= rel_tol < math.inf and 0 <= abs_tol < math.inf):
        raise ValueError(f"rel_tol {rel_tol} and abs_tol {abs_tol} must be finite and at least 0")
    return float(_close(gold, found, rel_tol, abs_tol))


def _close(gold: int | float, found: int | float, rel_tol: float, abs_tol: float) -> bool:
    """``math.isclose``, of whole numbers too that no float holds."""
    try:
        return math.isclose(gold, found, rel_tol=rel_tol, abs_tol=abs_tol)
    except OverflowError:
        ours, theirs = Fraction(gold), Fraction(found)
    reach = max(Fraction(rel_tol) * max(abs(ours), abs(theirs)), Fraction(abs_tol))
    return abs(ours - theirs) <= reach


def last_number(text: str) -> int | float | None:
    """The last number in the text; None without one, or where it is too long for a float or part of a
    formula."""
    readable = _readable(text)
    matches = list(_NUMBER.finditer(readable))
    if not matches:
        return None
    match = matches[-1]
    if _PART_BEFORE.search(readable[max(0, match.start() - 60) : match.start()]) or _PART_AFTER.match(
        readable, match.end()
    ):
        return None
    return _value(*match.groups())


def is_number(text: str) -> bool:
    """Whether the text is one number and nothing else."""
    match = _NUMBER.fullmatch(normalize(text).replace("\u2212", "-"))
    return match is not None and last_number(text) is not None


def _readable(text: str) -> str:
    """The text with numbers written plainly."""
    plain = normalize(text).replace("\u2212", "-")
    if "\\" in plain or "^" in plain or "~" in plain or "*" in plain or "\u00d7" in plain or "{,}" in plain:
        for pattern, plainly in _REWRITTEN:
            plain = pattern.sub(plainly, plain)
    return plain.strip()


def _value(sign: str, digits: str, exponent: str | None, denominator: str | None) -> int | float | None:
    digits = digits.replace(",", "")
    if len(digits) > _MAX_DIGITS or len(denominator or "") > _MAX_DIGITS:
        return None
    if "." not in digits and exponent is None and denominator is None:
        return int(sign + digits)
    value = float(sign + digits + (exponent or ""))
    if denominator is not None:
        divisor = float(denominator)
        if divisor == 0 or math.isinf(divisor):
            return None
        value /= divisor
    return (int(value) if value.is_integer() else value) if math.isfinite(value) else None
