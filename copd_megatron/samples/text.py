"""Token ids to text, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, Protocol

_INCOMPLETE = "\ufffd"
_MAX_TOKENS_PER_CHARACTER = 4  # UTF-8's longest sequence, where every byte is a token
_SHORTEST_RUN = 4


class Tokenizer(Protocol):
    """What a Hugging Face tokenizer offers and this module needs."""

    @property
    def all_special_ids(self) -> list[int]: ...

    def decode(self, token_ids: Any) -> Any: ...

    def batch_decode(self, sequences: Any) -> list[str]: ...


def token_texts(tokenizer: Tokenizer, token_ids: Sequence[int]) -> list[str]:
    """The text of each token, special tokens by name.

    A character whose bytes are spread over several tokens belongs to the last of them, and the others are
    empty. Bytes that form no character become the replacement character.
    """
    ids = [int(token) for token in token_ids]
    texts = tokenizer.batch_decode([[token] for token in ids])
    begin = 0
    while begin < len(ids):
        if _INCOMPLETE not in texts[begin]:
            begin += 1
            continue
        end, whole = _completed(tokenizer, ids, begin)
        texts[begin:end] = [""] * (end - begin - 1) + [whole]
        begin = end
    return texts


def _completed(tokenizer: Tokenizer, ids: Sequence[int], begin: int) -> tuple[int, str]:
    """Where the character that begins at a token ends, and the text of these tokens. A token that no others
    complete stands alone."""
    for end in range(begin + 2, min(begin + _MAX_TOKENS_PER_CHARACTER, len(ids)) + 1):
        whole = tokenizer.decode(ids[begin:end])
        if _INCOMPLETE not in whole:
            return end, whole
    return begin + 1, tokenizer.decode([ids[begin]])


def prompt_text(tokenizer: Tokenizer, token_ids: Sequence[int], max_tokens: int) -> str:
    """A prompt as text, special tokens included. Runs of one special token, such as the placeholders of an
    image, are written once with their number; of what is still too long, the beginning and the end."""
    special = set(tokenizer.all_special_ids)
    parts: list[tuple[list[int], str]] = []
    for token, run in groupby(int(token) for token in token_ids):
        count = len(list(run))
        if token in special and count >= _SHORTEST_RUN:
            parts.append(([token], f"*{count}"))
        else:
            parts += [([token], "")] * count
    head, tail = ends(len(parts), max_tokens)
    if head + tail == len(parts):
        return _joined(tokenizer, parts)
    gap = f" […{len(parts) - head - tail} tokens…] "
    return _joined(tokenizer, parts[:head]) + gap + _joined(tokenizer, parts[len(parts) - tail :])


def _joined(tokenizer: Tokenizer, parts: Sequence[tuple[list[int], str]]) -> str:
    """Tokens and what follows each of them, as text."""
    text, ids = "", list[int]()
    for tokens, note in parts:
        ids += tokens
        if note:
            text, ids = text + tokenizer.decode(ids) + note, []
    return text + (tokenizer.decode(ids) if ids else "")


def ends(length: int, most: int) -> tuple[int, int]:
    """How many of ``length`` items to keep from the beginning and from the end: all if they are at most
    ``most``, else half and half."""
    if length <= most:
        return length, 0
    return most - most // 2, most // 2
