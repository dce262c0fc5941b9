"""``numeric``: the final answer is the gold number, within a tolerance."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from copd_megatron.rewards.final_answer import final_answer, normalize
from copd_megatron.rewards.registry import register

# Groups: sign, number with optional thousands separators, exponent, and the denominator of a fraction.
_NUMBER = re.compile(
    r"(?<![\w.])([+-]?)((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)([eE][+-]?\d+)?(?:\s?/\s?(\d+))?(?![\d])"
)
_MAX_DIGITS = 400
_DEFAULT_REL_TOL = 1e-9


@register("numeric", isolated=False)
def numeric(response: str, answer: str, metadata: Mapping[str, Any]) -> float:
    """1.0 if the last number of the final answer equals the gold number.

    Two integers must be equal unless metadata gives a tolerance; other numbers may differ by
    max(rel_tol * larger magnitude, abs_tol). metadata: ``rel_tol`` (default 1e-9), ``abs_tol`` (0).
    Understood: 1,234.5, -3/4, 2.5e-3, a unit or sign of currency or percent beside the number (ignored).

    Raises ValueError if the gold answer holds no number.
    """
    gold = last_number(answer)
    if gold is None:
        raise ValueError(f"gold answer {answer[:60]!r} holds no number. Use the verifier 'exact' for it.")
    found = last_number(final_answer(response).text)
    if found is None:
        return 0.0
    if isinstance(gold, int) and isinstance(found, int) and not {"rel_tol", "abs_tol"} & set(metadata):
        return float(gold == found)
    rel_tol = float(metadata.get("rel_tol", _DEFAULT_REL_TOL))
    abs_tol = float(metadata.get("abs_tol", 0.0))
    return float(math.isclose(gold, found, rel_tol=rel_tol, abs_tol=abs_tol))


def last_number(text: str) -> int | float | None:
    """The last number in the text; None without one, or where it is too long for a float."""
    matches = list(_NUMBER.finditer(normalize(text).replace("\u2212", "-")))
    if not matches:
        return None
    sign, digits, exponent, denominator = matches[-1].groups()
    digits = digits.replace(",", "")
    if len(digits) > _MAX_DIGITS or len(denominator or "") > _MAX_DIGITS:
        return None
    if "." not in digits and exponent is None and denominator is None:
        return int(sign + digits)
    value = float(sign + digits + (exponent or ""))
    if denominator is not None:
        if int(denominator) == 0:
            return None
        value /= float(denominator)
    return (int(value) if value.is_integer() else value) if math.isfinite(value) else None


def is_number(text: str) -> bool:
    """Whether the text is one number and nothing else."""
    match = _NUMBER.fullmatch(normalize(text).replace("\u2212", "-"))
    return match is not None and last_number(text) is not None
