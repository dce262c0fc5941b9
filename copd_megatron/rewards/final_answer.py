"""Which part of a response counts as its final answer; shared by all verifiers that compare answers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from copd_megatron.untrusted.unicode_text import nfkc

_MARKER = re.compile(
    r"\banswer(?:\*\*)?(?:[ \t]+is(?:[ \t]*[:\uff1a])?|[ \t]*[:\uff1a])(?:\*\*)?", re.IGNORECASE
)
_NO_ANSWER = re.compile(
    r"\W*(?:correct|wrong|helpful|useful|clear|complete|satisfactory|what you)\b", re.IGNORECASE
)
"""What follows "answer is" where a sentence is about the answer: "I hope this answer is helpful!". Nothing
that "Answer:" introduces is meant, and not "right", which is a direction as well."""
_HOPE = re.compile(r"(?<=[\s.!?])I hope (?:it|my|that|the|this)\b.*", re.IGNORECASE)
_MARKERS_READ = 8
_FENCE = re.compile(r"```[A-Za-z]{0,12}[ \t]*\n(.*?)\n?[ \t]*```\s*\Z", re.DOTALL)
_FENCE_SEARCHED = 20_000
"""Characters from the end in which a fenced block is looked for."""
_SPACES = re.compile(r"\s+")


class Source(Enum):
    """What marked the final answer."""

    boxed = "boxed"
    tag = "tag"
    marker = "marker"
    last_line = "last_line"
    nothing = "nothing"


@dataclass(frozen=True)
class FinalAnswer:
    """A response's final answer, and why it is taken for it."""

    text: str
    source: Source


def final_answer(response: str, *, multiline: bool = False) -> FinalAnswer:
    r"""The response's final answer, by the first rule that applies:

    1. the contents of the last ``\boxed{...}``,
    2. the contents of the last ``<answer>...</answer>``,
    3. what follows the last "Answer:" or "answer is": the rest of its line or, where that is empty, all
       that follows,
    4. the contents of a fenced block at the end, or else the last line that is not empty (``multiline``: the
       whole text, for answers of several lines).

    Only what follows the last ``</think>`` (or another model's sign for the end of thinking) counts; a
    response cut off while thinking has no final answer.
    """
    text = after_thinking(response)
    if text is None:
        return FinalAnswer("", Source.nothing)
    boxed = last_boxed(text)
    if boxed is not None:
        return FinalAnswer(boxed.strip(), Source.boxed)
    tagged = _last_tagged(text)
    if tagged is not None:
        return FinalAnswer(tagged.strip(), Source.tag)
    marked = _last_marked(text)
    if marked is not None:
        return FinalAnswer(marked, Source.marker)
    stripped = text.strip()
    if not stripped:
        return FinalAnswer("", Source.nothing)
    last = stripped if multiline else stripped.rsplit("\n", 1)[-1].strip()
    return FinalAnswer(_last_fenced(stripped) or last, Source.last_line)


_THINKING = (
    *tuple(
        (f"<{name}>", f"</{name}>") for name in ("think", "thinking", "thought", "reasoning", "scratchpad")
    ),
    ("[THINK]", "[/THINK]"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
)


def after_thinking(response: str) -> str | None:
    """What follows the last end of thinking; None where thinking is still going on at the end."""
    text = response
    for opening, closing in _THINKING:
        if closing in text:
            text = text[text.rindex(closing) + len(closing) :]
        if opening in text:
            return None
    return text


_BETWEEN_BOXES = re.compile(r"[\s$,;.]*(?:\\text\{\s*)?(?:and|or|,|;)?(?:\s*\})?[\s$,;]*", re.IGNORECASE)


def adjacent_boxes(response: str) -> list[str]:
    r"""Contents of the boxes that stand side by side with the last one, as in ``\boxed{1}, \boxed{2}``."""
    text = after_thinking(response) or ""
    boxes: list[str] = []
    while (content := last_boxed(text)) is not None and len(boxes) < 8:
        start = text.rindex("{" + content + "}")
        command = max(text.rfind("\\boxed", 0, start + 1), text.rfind("\\fbox", 0, start + 1))
        between = text[start + len(content) + 2 :]
        if boxes and not _BETWEEN_BOXES.fullmatch(between):
            break
        boxes.insert(0, content.strip())
        text = text[:command]
    return boxes


def last_boxed(text: str) -> str | None:
    r"""Contents of the last ``\boxed{...}`` or ``\fbox{...}`` whose braces balance, None without one."""
    for start in sorted(_starts(text, "\\boxed{") + _starts(text, "\\fbox{"), reverse=True)[:8]:
        opening = text.index("{", start)
        depth = 0
        for position in range(opening, len(text)):
            if text[position] == "{":
                depth += 1
            elif text[position] == "}":
                depth -= 1
                if depth == 0:
                    return text[opening + 1 : position]
    return None


def _starts(text: str, needle: str) -> list[int]:
    starts = []
    position = text.find(needle)
    while position >= 0:
        starts.append(position)
        position = text.find(needle, position + 1)
    return starts


def _last_tagged(text: str) -> str | None:
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    return text[start + len("<answer>") : end] if start >= 0 else None


def _last_marked(text: str) -> str | None:
    """What follows the last marker that introduces an answer."""
    for marker in reversed(list(_MARKER.finditer(text))[-_MARKERS_READ:]):
        line, _, rest = text[marker.end() :].partition("\n")
        if marker.group().rstrip("* \t")[-1] not in ":\uff1a" and _NO_ANSWER.match(line):
            continue
        found = _HOPE.sub("", line).strip() or _unfenced(rest.strip())
        if found and found.count("**") % 2:  # "**Answer: 42**"
            found = found.removesuffix("**").rstrip()
        return found or None
    return None


def _last_fenced(text: str) -> str | None:
    """Contents of a fenced block that the text ends with, None without one."""
    if not text.endswith("```"):
        return None
    end = text[-_FENCE_SEARCHED:]
    start = end.rfind("```", 0, -3)
    fenced = _FENCE.fullmatch(end, start) if start >= 0 else None
    return None if fenced is None else fenced.group(1).strip()


def _unfenced(text: str) -> str:
    return (_last_fenced(text) or text) if text.startswith("```") else text


def normalize(answer: str, *, case_sensitive: bool = False) -> str:
    r"""The answer without what does not change its meaning.

    Unicode compatibility forms, runs of white space, one layer each of ``$...$``, ``\text{...}``,
    ``**...**``, backticks and quotation marks, a full stop at the end, and (by default) letter case.
    """
    text = _SPACES.sub(" ", nfkc(answer)).strip()
    for opening, closing in (("$", "$"), ("\\(", "\\)"), ("\\text{", "}"), ("**", "**"), ("`", "`")):
        text = _unwrap(text, opening, closing)
    if text.endswith(".") and not text.endswith(".."):
        text = text[:-1].rstrip()
    for opening, closing in (("**", "**"), ("$", "$"), ("\\text{", "}"), ('"', '"'), ("'", "'"), ("“", "”")):
        text = _unwrap(text, opening, closing)
    return text if case_sensitive else text.casefold()


def _unwrap(text: str, opening: str, closing: str) -> str:
    if len(text) <= len(opening) + len(closing) or not (text.startswith(opening) and text.endswith(closing)):
        return text
    inner = text[len(opening) : len(text) - len(closing)]
    return text if opening in inner or closing in inner else inner.strip()
