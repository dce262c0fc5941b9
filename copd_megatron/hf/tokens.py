"""What a folder's tokenizer says its token ids mean. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from copd_megatron.hf.companions import read_json

_TOKENIZER, _VOCABULARY = "tokenizer.json", "vocab.json"
_OBJECTS: Final = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
_MAX_ID: Final = 1 << 24
"""The tokenizer's memory grows with the largest id; no model has a million."""
_MAX_GROWTH: Final = 1000
"""How many times longer normalizing may make a text. One character becomes a few at most."""


def check_files(folder: Path) -> None:
    """Whether a folder's tokenizer can be loaded, as far as its files say. On some files libraries take all
    memory or end the process, on others they raise what names no file.

    Raises:
        ValueError: with the file and what is wrong in it.
    """
    for name in _OBJECTS:
        read_json(folder, name)
    ids = token_ids(folder) or {}
    if ids and not 0 <= min(ids.values()) <= max(ids.values()) <= _MAX_ID:
        token = max(ids, key=lambda token: abs(ids[token]))
        raise ValueError(
            f"{folder}: token {token!r:.40} has the id {ids[token]}; ids end at {_MAX_ID}; copy it again"
        )
    tokenizer = read_json(folder, _TOKENIZER)
    if tokenizer is None:
        return
    for key, kind in (("model", dict), ("added_tokens", list)):
        if not isinstance(tokenizer.get(key, kind()), kind):
            raise ValueError(f"{folder / _TOKENIZER}: {key} is no {kind.__name__}; copy it again")
    for key in ("normalizer", "decoder"):
        if _growth(tokenizer.get(key)) > _MAX_GROWTH:
            raise ValueError(
                f"{folder / _TOKENIZER}: its {key} makes texts more than {_MAX_GROWTH} times "
                "longer; copy it again"
            )


def _growth(part: Any) -> float:
    """At most so many times longer a step of a tokenizer, or a sequence of them, makes a text."""
    if isinstance(part, list):
        return math.prod(_growth(step) for step in part)
    if not isinstance(part, Mapping):
        return 1
    content = part.get("content", part.get("prepend"))
    own = max(len(content), 1) if isinstance(content, str) else 1
    return own * math.prod(_growth(value) for value in part.values())


def token_ids(folder: Path | None) -> dict[str, int] | None:
    """Token to id, added tokens included; None where the folder has neither tokenizer.json nor vocab.json.

    Raises:
        ValueError: the file is damaged.
    """
    tokenizer = read_json(folder, _TOKENIZER)
    if tokenizer is not None:
        return _read(folder, _TOKENIZER, {"model": {}, **tokenizer})
    vocabulary = read_json(folder, _VOCABULARY)
    return None if vocabulary is None else _read(folder, _VOCABULARY, {"model": {"vocab": vocabulary}})


def merge_rules(folder: Path | None) -> dict[str, int]:
    """The rules by which a byte-pair tokenizer joins tokens, to their ranks; none for other kinds.

    Raises:
        ValueError: the file is damaged.
    """
    tokenizer = read_json(folder, _TOKENIZER)
    model = {} if tokenizer is None else tokenizer.get("model")
    rules = model.get("merges") if isinstance(model, Mapping) else None
    if not isinstance(rules, list):
        return {}
    return {_rule(rule): rank for rank, rule in enumerate(rules)}


def _rule(rule: Any) -> str:
    """``a b``, however it is written down."""
    return " ".join(map(str, rule)) if isinstance(rule, list) else str(rule)


def _read(folder: Path | None, name: str, tokenizer: Mapping[str, Any]) -> dict[str, int]:
    try:
        return {str(token): int(number) for token, number in _pairs(tokenizer)}
    except (TypeError, KeyError, IndexError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(
            f"{folder}/{name} is not a tokenizer ({type(error).__name__}: {error}); copy it again"
        ) from None


def _pairs(tokenizer: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    vocabulary = tokenizer["model"].get("vocab", {})
    if isinstance(vocabulary, Mapping):
        yield from vocabulary.items()
    else:  # a unigram model lists [token, score] pairs; its ids are the places in the list
        yield from ((entry[0], number) for number, entry in enumerate(vocabulary))
    for token in tokenizer.get("added_tokens") or ():
        yield token["content"], token["id"]
