"""Whether models can be merged at all: the same tensors, the same architecture, the same tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from copd_megatron.formats.tensors import TensorSource
from copd_megatron.hf.companions import read_json
from copd_megatron.hf.model_config import read_sizes
from copd_megatron.hf.tensors import block_range
from copd_megatron.hf.tokens import merge_rules, token_ids
from copd_megatron.model.shape import SUPPORTED_ARCHITECTURES
from copd_megatron.model.slots import tied_copy

IGNORED_CONFIG_KEYS = {
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "initializer_range",
    "attention_dropout",
    "gradient_checkpointing",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
}
"""Keys that may differ between checkpoints of one architecture, since they change neither the meaning of a
weight nor how it is used at inference. (Special tokens are compared in the tokenizer.)"""

_SHOWN = 5


class MismatchError(ValueError):
    """Models that cannot be merged with each other: names what differs."""


class NotFiniteError(ValueError):
    """A model holds NaN or infinities, or the result would: names the model and the tensor."""


def check_mergeable(sources: Sequence[TensorSource], *, allow: Sequence[str] = ()) -> None:
    """Compares every input with the first.

    Args:
        allow: configuration keys (dotted) that may differ.

    Raises:
        MismatchError: names the tensors, configuration keys or tokens that differ.
    """
    first = sources[0]
    for source in sources:
        _check_types(source)
    for other in sources[1:]:
        pair = f"{other.label} and {first.label}"
        _check_config(first, other, pair, set(allow))
        _check_tensors(first, other, pair)
        _check_tokenizer(first, other, pair)


def _check_types(source: TensorSource) -> None:
    """Refuses eight-bit weights: they mean nothing without their scales, which are separate tensors."""
    narrow = [
        f"{name} ({spec.dtype})"
        for name in source.names()
        if (spec := source.spec(name)).dtype.is_floating_point and spec.dtype.itemsize == 1
    ]
    if narrow:
        raise MismatchError(
            f"{source.label} is quantised: {_list(narrow)}; merge or convert models before quantising them"
        )


def check_tied_copies(sources: Sequence[TensorSource], companions: Path) -> None:
    """Refuses models whose stored output embedding is not the embedding that config.json ties it to: a format
    that keeps it once would lose it.

    Args:
        companions: folder with the models' config.json.

    Raises:
        MismatchError: names the model.
    """
    for tied, original in tied_copy(read_sizes(companions, "model")).items():
        for source in sources:
            if tied in source.names() and not _equal(source, tied, original):
                raise MismatchError(
                    f"{source.label}: {tied} differs from {original}, but config.json ties them: set "
                    "tie_word_embeddings to false there"
                )


def _equal(source: TensorSource, one: str, other: str) -> bool:
    """Whether two tensors of a model hold the same bytes."""
    a, b = source.spec(one), source.spec(other)
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    for block in range(a.num_blocks):
        start, stop = block_range(a, block)
        left, right = (torch.empty(stop - start, dtype=a.dtype) for _ in range(2))
        source.read_into(one, start, left)
        source.read_into(other, start, right)
        if not torch.equal(left.view(torch.uint8), right.view(torch.uint8)):
            return False
    return True


def _check_tensors(first: TensorSource, other: TensorSource, pair: str) -> None:
    ours, theirs = set(first.names()), set(other.names())
    if ours != theirs:
        parts = [
            f"only in {source.label}: {_list(names)}"
            for source, names in ((first, ours - theirs), (other, theirs - ours))
            if names
        ]
        raise MismatchError(f"merge: {pair} do not have the same tensors; {'; '.join(parts)}")
    shapes = [
        f"{name} {list(other.spec(name).shape)} and {list(first.spec(name).shape)}"
        for name in first.names()
        if other.spec(name).shape != first.spec(name).shape
    ]
    if shapes:
        raise MismatchError(f"merge: {pair} differ in shapes: {_list(shapes)}")
    kinds = [
        f"{name} {other.spec(name).dtype} and {first.spec(name).dtype}"
        for name in first.names()
        if other.spec(name).dtype != first.spec(name).dtype
        and not (other.spec(name).dtype.is_floating_point and first.spec(name).dtype.is_floating_point)
    ]
    if kinds:
        raise MismatchError(f"merge: {pair} differ in types that cannot be merged: {_list(kinds)}")


def _check_config(first: TensorSource, other: TensorSource, pair: str, allow: set[str]) -> None:
    ours, theirs = (read_json(source.companions, "config.json") for source in (first, other))
    what = "config.json"
    if ours is None or theirs is None:
        ours, theirs = _sizes(first), _sizes(other)
        what = "sizes"
    if ours is None or theirs is None:
        return  # a source without a configuration is compared by its tensors' names and shapes alone
    flat = [_flatten(config) for config in (ours, theirs)]
    different = [
        f"{key} ({_show(flat[1], key)} and {_show(flat[0], key)})"
        for key in sorted(flat[0].keys() | flat[1].keys())
        if key.rpartition(".")[2] not in IGNORED_CONFIG_KEYS
        and not any(key == allowed or key.startswith(allowed + ".") for allowed in allow)
        and flat[0].get(key) != flat[1].get(key)
    ]
    if different:
        raise MismatchError(
            f"merge: {pair} differ in {what}: {_list(different)}; "
            "merge models of one architecture, or --allow KEY for what does not matter"
        )


def _sizes(source: TensorSource) -> dict[str, Any] | None:
    """The model's sizes as the checkpoint records them, or as config.json gives them."""
    if source.dims is not None:
        return asdict(source.dims)
    config = read_json(source.companions, "config.json")
    if config is None or set(SUPPORTED_ARCHITECTURES).isdisjoint(config.get("architectures") or ()):
        return None
    assert source.companions is not None
    return asdict(read_sizes(source.companions, source.label))


def _check_tokenizer(first: TensorSource, other: TensorSource, pair: str) -> None:
    ours, theirs = (_vocabulary(source) for source in (first, other))
    if ours is None or theirs is None:
        return
    different = [
        f"{token!r} ({theirs.get(token, 'missing')} and {ours.get(token, 'missing')})"
        for token in sorted(ours.keys() | theirs.keys())
        if ours.get(token) != theirs.get(token)
    ]
    if different:
        raise MismatchError(
            f"merge: {pair} have different tokenizers, rows of their embeddings mean different tokens: "
            f"{_list(different)}"
        )


def _vocabulary(source: TensorSource) -> dict[str, str] | None:
    """What each token or merge rule stands for; None if there is no tokenizer."""
    tokens = token_ids(source.companions)
    if tokens is None:
        return None
    rules = merge_rules(source.companions)
    return {f"merge {rule}": f"rank {rank}" for rule, rank in rules.items()} | {
        token: f"id {number}" for token, number in tokens.items()
    }


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _show(flat: Mapping[str, Any], key: str) -> str:
    return repr(flat[key]) if key in flat else "missing"


def _list(items: Sequence[str] | set[str]) -> str:
    ordered = sorted(items) if isinstance(items, set) else list(items)
    more = f" and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else ""
    return ", ".join(ordered[:_SHOWN]) + more
