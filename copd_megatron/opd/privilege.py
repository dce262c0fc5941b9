"""What a teacher or a peer reads that the student did not: texts, and their place in a tokenised prompt.

Pure, but for the tokenizer. A context is put behind the problem, inside the user's last message, by splicing
tokens: the prompt's own tokens, those of its images and videos included, stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from copd_megatron.errors import DataError
from copd_megatron.records import IntArray

_PARAGRAPH = re.compile(r"\n{2,}")
_MARK = "\u241f"
"""Stands for a user's text in a rendered chat template: a character that no template has."""


class Splicer:
    """Puts text behind a tokenised prompt's last message."""

    def __init__(self, tokenizer: Any) -> None:
        """``tokenizer``: a Hugging Face tokenizer, with or without a chat template."""
        self._tokenizer = tokenizer
        self._tail = self._encode(_template_tail(tokenizer))

    def splice(self, prompt: IntArray, text: str) -> IntArray:
        """[P + t] token ids of the prompt with ``text`` at the end of the user's message.

        Raises:
            DataError: the prompt does not end as the chat template ends a user's message.
        """
        tail = self._tail
        head = prompt[: len(prompt) - len(tail)]
        if prompt[len(head) :].tolist() != tail.tolist():
            raise DataError(
                "a prompt does not end as the chat template ends a user's message, so there is no place for "
                "a privileged context; its last message must be the user's"
            )
        return np.concatenate([head, self._encode(text), tail]).astype(np.int32)

    def text(self, token_ids: IntArray) -> str:
        """Token ids as text, special tokens left out."""
        return str(self._tokenizer.decode(token_ids.tolist(), skip_special_tokens=True))

    def _encode(self, text: str) -> IntArray:
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        return np.asarray(ids, dtype=np.int32)


def _template_tail(tokenizer: Any) -> str:
    """What follows the user's text in a rendered prompt."""
    if getattr(tokenizer, "chat_template", None) is None:
        return ""
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": _MARK}], add_generation_prompt=True, tokenize=False
    )
    return str(rendered).rpartition(_MARK)[2]


def context_text(template: str, *, solution: str | None, feedback: str | None) -> str:
    """The teacher's context: the template's paragraphs, those left out whose part is missing.

    A paragraph that introduces a part and the part itself are one paragraph of the template.
    """
    given = {"solution": solution, "feedback": feedback}
    kept = []
    for paragraph in _PARAGRAPH.split(template):
        names = [name for name in given if f"{{{name}}}" in paragraph]
        if any(not given[name] for name in names):
            continue
        for name in names:
            paragraph = paragraph.replace(f"{{{name}}}", given[name] or "")
        kept.append(paragraph)
    return "\n\n".join(kept)


def names_a_concept(feedback: str, problem: str) -> bool:
    """Whether the first line reads ``Concept: <words of the problem>``."""
    first = feedback.strip().partition("\n")[0]
    found = re.fullmatch(r"\W*concept\W*:\s*(.+)", first, re.IGNORECASE)
    return found is not None and _plain(found[1]) in _plain(problem) and bool(_plain(found[1]).strip())


def without_answer(feedback: str, gold: str) -> str:
    """The feedback without the sentences that state the gold answer.

    An answer is stated where its words stand between others, in any case and spacing: 12 is stated in
    "it is 12." and not in "120".
    """
    words = _spaced(gold).rstrip(".")
    if not words:
        return feedback
    stated = re.compile(rf"(?<![\w.-]){re.escape(words)}(?!\w|[.,]\d)")
    sentences = re.split(r"(?<=[.!?])(?=\s)|(?<=\n)", feedback)
    kept = [sentence for sentence in sentences if not stated.search(_spaced(sentence))]
    return "".join(kept).strip()


def others_correct(correct: Sequence[bool], member: int) -> list[int]:
    """Members of a group, other than ``member``, that are correct."""
    return [i for i, right in enumerate(correct) if right and i != member]


def _spaced(text: str) -> str:
    """Lower case, single spaces."""
    return " ".join(text.lower().split())


def _plain(text: str) -> str:
    """Lower case, single spaces, punctuation at the edges of words left out."""
    words = [word.strip(".,;:!?\"'()[]{}<>$*`=") for word in text.lower().split()]
    return " ".join(word for word in words if word)
