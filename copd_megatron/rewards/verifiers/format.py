"""``format``: whether a response is built as it should be; says nothing about its answer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from copd_megatron.rewards.final_answer import Source, after_thinking, final_answer, last_boxed
from copd_megatron.rewards.metadata import setting
from copd_megatron.rewards.registry import register

_PARTS = ("thinking", "answer", "end")
_ANSWERS = {"any": (Source.boxed, Source.tag, Source.marker), "boxed": (Source.boxed,), "tag": (Source.tag,)}
_THINKING = re.compile(r"\s*<think>(?P<inside>.*?)</think>", re.DOTALL)
_CLOSING = re.compile(r"[\s$.*)\]}\\]{0,20}")
"""What may stand behind a boxed answer: the end of its formula, of its sentence, of bold type."""


@register("format", isolated=False, gold_is_a_response=False)
def format_of(response: str, answer: str, metadata: Mapping[str, Any]) -> float:
    r"""1.0 if the response has all parts that it should have.

    metadata: ``parts`` (default all): ``thinking`` (begins with one ``<think>...</think>`` that is not
    empty), ``answer`` (gives an answer after it), ``end`` (nothing follows the answer). ``style``, how the
    answer is given: ``boxed``, ``tag`` (``<answer>...</answer>``) or ``any`` (default; also "Answer: ...").
    ``partial`` (default false; true: the share of parts). The gold answer is not looked at, so give this a
    small weight beside a verifier that does: in the sample (``weighted``) or for a branch
    (``reward.terms``).

    Raises ValueError for a part or a style that is none.
    """
    parts, style = setting(metadata, "parts", list(_PARTS)), setting(metadata, "style", "any")
    is_known = isinstance(parts, list) and all(part in _PARTS for part in parts)
    if not parts or not is_known or style not in list(_ANSWERS):
        raise ValueError(
            f"verifier 'format' knows the parts {', '.join(_PARTS)} and the styles {', '.join(_ANSWERS)}, "
            f"not {parts!r:.60} and {style!r:.60}."
        )
    source = final_answer(response).source
    has = {
        "thinking": _thinks_once(response),
        "answer": source in _ANSWERS[style],
        "end": source in _ANSWERS[style] and _ends_with_answer(response, source),
    }
    met = [has[part] for part in parts]
    return sum(met) / len(met) if setting(metadata, "partial", False) else float(all(met))


def _thinks_once(response: str) -> bool:
    match = _THINKING.match(response)
    if match is None or response.count("<think>") != 1 or response.count("</think>") != 1:
        return False
    return bool(match["inside"].strip())


def _ends_with_answer(response: str, source: Source) -> bool:
    text = (after_thinking(response) or "").rstrip()
    if source is Source.tag:
        return text.endswith("</answer>")
    if source is Source.boxed:
        inside = last_boxed(text) or ""
        start = text.rindex("{" + inside + "}")
        return _CLOSING.fullmatch(text, start + len(inside) + 2) is not None
    return final_answer(response).text.endswith(text.rsplit("\n", 1)[-1].split(":")[-1].strip(" *"))
