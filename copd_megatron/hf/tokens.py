"""What a folder's tokenizer says its token ids mean. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from copd_megatron.hf.companions import read_json

_TOKENIZER, _VOCABULARY = "tokenizer.json", "vocab.json"


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
