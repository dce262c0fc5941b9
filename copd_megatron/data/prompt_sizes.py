"""Prompts that are too long beyond doubt, known without tokenising them: twenty million characters would take
a minute and gigabytes of memory. Imports neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from copd_megatron.data.samples import Message, texts_and_media

_NORMALIZED: Final = 4
"""How many times shorter normalising may make a text: a letter and its accents become one character."""


def most_characters(tokenizer: Any, max_tokens: int) -> int:
    """Characters that a prompt of ``max_tokens`` has at most: all as in the vocabulary's longest entry."""
    longest = max(map(len, tokenizer.get_vocab()), default=1)
    return max_tokens * longest * _NORMALIZED


def num_characters(prompt: str | Sequence[Message]) -> int:
    """Of a prompt's texts."""
    return sum(len(text) for kind, text in texts_and_media(prompt) if kind == "text")
