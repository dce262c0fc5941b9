r"""The mathematics in a final answer that is a sentence: "The answer is $x = 5$, as ..." """

from __future__ import annotations

import itertools
import re

from copd_megatron.rewards.final_answer import FinalAnswer, Source

_SEGMENT = re.compile(
    r"(?<!\\)\$\$(.+?)(?<!\\)\$\$|(?<!\\)\$(?!\d[\d,.]*(?:\s|$))(.+?)(?<!\\)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]",
    re.DOTALL,
)
_WORD = re.compile(r"[A-Za-z]{2,}|\b[aI]\b(?=\s+[a-z]{2})")
_MATHEMATICAL_WORDS = frozenset(
    [
        "sqrt",
        "sin",
        "cos",
        "tan",
        "cot",
        "sec",
        "csc",
        "arcsin",
        "arccos",
        "arctan",
        "sinh",
        "cosh",
        "tanh",
        "exp",
        "log",
        "ln",
        "pi",
        "theta",
        "infinity",
        "inf",
        "oo",
        "mod",
    ]
)
_DOUBT = re.compile(
    r"\b(?:or|either|maybe|perhaps|possibly|probably|might|not|never|neither|nor|except|unless|wrong|incorrect"
    r"|other than|rather|instead|at least|at most|more than|less than|fewer than|greater than|between"
    r"|unknown)\b|n't\b",
    re.IGNORECASE,
)
_DANGLING = re.compile(
    r"(?:\b(?:is|are|be|that|the|a|an|we|then|to|of|and|or|so|thus|hence|therefore|which|get|gives|equals|by|with|if"
    r"|for|in|as|because|since|from|let|now|first|next)|[=+*/,:(\[{^<>-]|\\cdot|\\times)\s*$",
    re.IGNORECASE,
)
_ITEM_NUMBER = re.compile(r"^\s*(?:\d{1,2}[.)]\s+|[-*\u2022]\s+|#+\s*)(?=\S)")
_ITEM_OF_WORDS = re.compile(r"^\s*\d{1,2}[.)]\s+(?=[A-Za-z])")
_LIST_BETWEEN = re.compile(r"\s*(?:,|;|,?\s*and|,?\s*or)\s*", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[^\d\s.])[.!?](?=\s+[A-Z])|(?<=\d)\.(?=\s+[A-Z])")
_CLOSING_MARKS = re.compile(r"(?<=[^\s*_`])[*_`]{1,3}(?=\.?\Z)")
"""The end of bold type before the end of the sentence. An exclamation mark would be read as a factorial."""
_MAX_WORDS_AFTER = 6


def answer_text(found: FinalAnswer) -> str | None:
    """The part of a final answer to read as mathematics; None where a sentence leaves it open.

    A box or tag holds the answer and nothing else. A sentence must hold one mathematical expression, or a
    list of them, without words of doubt or negation around it, and must not break off.
    """
    text = found.text.strip()
    if found.source in (Source.boxed, Source.tag):
        return text
    text = _SENTENCE_END.split(text, maxsplit=1)[0] if found.source is Source.marker else _last_sentence(text)
    text = (_ITEM_OF_WORDS if found.source is Source.last_line else _ITEM_NUMBER).sub("", text).strip(" *_`")
    text = _CLOSING_MARKS.sub("", text)
    if not _words(text):
        return text
    if found.source is Source.last_line and _breaks_off(text):
        return None
    segments = list(_SEGMENT.finditer(text))
    return _from_segments(text, segments, found) if segments else _from_words(text, found)


def _last_sentence(text: str) -> str:
    sentences = [part for part in _SENTENCE_END.split(text) if part and part.strip(" .")]
    return sentences[-1] if sentences else text


def _breaks_off(text: str) -> bool:
    return _DANGLING.search(text.rstrip()) is not None


def _words(text: str) -> list[str]:
    bare = re.sub(r"\\[A-Za-z]+(?:\{[A-Za-z ]*\})?", " ", text)
    return [word for word in _WORD.findall(bare) if word.casefold() not in _MATHEMATICAL_WORDS]


def _from_segments(text: str, segments: list[re.Match[str]], found: FinalAnswer) -> str | None:
    between = [text[a.end() : b.start()] for a, b in itertools.pairwise(segments)]
    inner = [next(group for group in segment.groups() if group is not None) for segment in segments]
    before, after = text[: segments[0].start()], text[segments[-1].end() :]
    if all(_LIST_BETWEEN.fullmatch(words) for words in between):
        if _negates(before) or _DOUBT.search(after):
            return None
        joined = inner[0]
        for words, part in zip(between, inner[1:], strict=True):
            joined += (r" \lor " if "or" in words.casefold() else " , ") + part
        return joined + _unit_after(after, len(inner))
    if _DOUBT.search(" ".join(between)) or _negates(before):
        return None
    return inner[0] if found.source is Source.marker else inner[-1]


def _negates(before: str) -> bool:
    return _DOUBT.search(re.sub(r"\beither\b", "", before, flags=re.IGNORECASE)) is not None


def _unit_after(after: str, num_segments: int) -> str:
    words = re.fullmatch(r"\s*([A-Za-z%]+(?:[/^ ]+[A-Za-z\d]+){0,2})\s*[.!]?", after)
    if words is None or num_segments > 1 or words.group(1).casefold().split()[0] in _CLAUSE:
        return ""
    return "%" if words.group(1).casefold() in ("%", "percent") else rf"\text{{ {words.group(1)}}}"


_CLAUSE = frozenset(
    [
        "as",
        "because",
        "since",
        "which",
        "so",
        "if",
        "when",
        "where",
        "for",
        "in",
        "on",
        "at",
        "by",
        "with",
        "from",
        "after",
        "before",
        "per",
        "each",
    ]
)


def _from_words(text: str, found: FinalAnswer) -> str | None:
    """One run of mathematics among words."""
    runs = _runs(text)
    if not runs:
        return text
    (start, end), between = runs[0], [text[a[1] : b[0]] for a, b in itertools.pairwise(runs)]
    if len(runs) > 1 and all(_LIST_BETWEEN.fullmatch(words) for words in between):
        end = runs[-1][1]
    elif len(runs) > 1 and (found.source is not Source.marker or _DOUBT.search(text[end : runs[-1][1]])):
        return None
    before, after = text[:start], text[end:]
    if _negates(before):
        return None
    if re.search(r"\b(?:or|maybe|perhaps|possibly)\s+\S", after) and not re.match(r"\s*or so\b", after):
        return None
    expression = text[start:end].strip(" ,;")
    if found.source is Source.last_line:
        num_words, is_closed = len(after.split()), re.search(r"[.!]\s*$", text) is not None
        if num_words > (_MAX_WORDS_AFTER if is_closed else 1):
            return None
    return re.sub(r"\s+$", "", expression) + _plain_unit(after)


def _runs(text: str) -> list[tuple[int, int]]:
    """Where mathematics stands among words: tokens with digits, commands, operators or single letters."""
    runs: list[tuple[int, int]] = []
    for token in re.finditer(r"\S+", text):
        bare = token.group().strip(",.;!*") or token.group()
        if not _is_mathematical(bare):
            continue
        gap = text[runs[-1][1] : token.start()] if runs else "x"
        if runs and not gap.strip():
            runs[-1] = (runs[-1][0], token.start() + len(token.group().rstrip(".!*") or token.group()))
        else:
            runs.append((token.start(), token.start() + len(token.group().rstrip(".!,;*") or token.group())))
    return [(start, end) for start, end in runs if re.search(r"[\dA-Za-z\\]", text[start:end])]


def _is_mathematical(token: str) -> bool:
    if re.search(r"\d|\\[A-Za-z]|[√π∞½¼¾]", token):
        return True
    if re.fullmatch(r"[-+*/=^<>≤≥×·±()\[\]{}]+", token):  # noqa: RUF001
        return True
    return re.fullmatch(
        r"[(\[{-]*[b-hj-zB-HJ-Z](?:\([a-z]\))?[)\]}]*", token
    ) is not None or token.casefold() in (_MATHEMATICAL_WORDS)


def _plain_unit(after: str) -> str:
    words = re.match(r"\s*([A-Za-z]+(?:/[A-Za-z]+)?(?:\^\d)?)\s*[.!]?\s*$", after)
    return (
        rf" \text{{{words.group(1)}}}" if words and words.group(1).casefold() not in _CLAUSE | {"so"} else ""
    )
