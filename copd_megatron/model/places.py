"""Hugging Face tensors inside Megatron's. Pure: no torch.

Megatron's distributed format knows neither tensor nor pipeline parallelism: a tensor is whole, layers (and
their experts) are stacked along first axes, q, k and v of each query group lie together in ``linear_qkv``,
gate and up in ``linear_fc1``. Every Hugging Face tensor is therefore some rows of one layer of one Megatron
tensor, or, where a folder stacks experts too, such rows of one expert after the other, each transposed.
Nothing else is needed to convert in either direction.

    model.layers.3.self_attn.k_proj.weight  =  decoder.layers.self_attention.linear_qkv.weight[3, rows]

with, for 8 query heads in 2 groups of head size 16, rows 64..80 and 160..176.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from copd_megatron.model.shape import ModelShape, VisionShape
from copd_megatron.model.slots import Slot, Stack, slots

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_FUSED_NORMS = {
    "input_layernorm": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm": "mlp.linear_fc1.layer_norm_weight",
}
"""Norms that Transformer Engine keeps in the linear layer behind them; the checkpoint always does."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a Hugging Face tensor lies in a Megatron checkpoint."""

    key: str
    """Megatron's name."""
    at: tuple[int, ...]
    """Index along the first axes: layer, then expert; empty: the tensor is not stacked."""
    rows: tuple[tuple[int, int], ...]
    """[start, stop) ranges of rows (behind those axes) that make it up, in order."""
    shape: tuple[int, ...]
    """The Hugging Face tensor's, or [inputs, outputs] of one expert in a ``stack``."""
    stack: Stack | None = None
    """The rows lie transposed in it."""
    begin: int = 0
    """Element of the Hugging Face tensor at which they begin."""

    @property
    def num_rows(self) -> int:
        return sum(stop - start for start, stop in self.rows)

    def rows_between(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Rows of the Megatron tensor behind rows [start, stop) of the Hugging Face one."""
        found, begin = [], 0
        for first, last in self.rows:
            size = last - first
            low, high = max(start, begin), min(stop, begin + size)
            if low < high:
                found.append((first + low - begin, first + high - begin))
            begin += size
        return found


@dataclass(frozen=True, kw_only=True)
class MegatronTensor:
    """A whole Megatron tensor, or one layer (and expert) of a stacked one, and what it is made of."""

    key: str
    at: tuple[int, ...]
    shape: tuple[int, ...]
    """Without the axes of ``at``."""
    parts: tuple[tuple[str, Place], ...]
    """Hugging Face tensors that together cover its rows."""


def places(dims: ModelShape) -> dict[str, tuple[Place, ...]]:
    """Every Hugging Face tensor of the model, in forward order; a stack has a place for every expert."""
    table: dict[str, tuple[Place, ...]] = {}
    for slot in slots(dims, 1):
        if slot.stack is None:
            table[slot.name] = (_place(slot, dims),)
        elif slot.part != "up":  # gate and up are the rows of one Megatron tensor and of one stack
            before = table.get(slot.stack.name, ())
            table[slot.stack.name] = (*before, _expert_place(slot, slot.stack, len(before)))
    return table


def full_shape(parts: tuple[Place, ...]) -> tuple[int, ...]:
    """The Hugging Face tensor's, a stack's as published."""
    stack = parts[0].stack
    return parts[0].shape if stack is None else stack.shape


def stack_sizes(dims: ModelShape, key: str) -> tuple[int, ...]:
    """Sizes of a Megatron tensor's first axes: layers, then experts."""
    if not key.startswith("decoder.layers."):
        return ()
    if ".experts." in key and dims.num_experts is not None:
        return (dims.num_layers, dims.num_experts)
    return (dims.num_layers,)


def megatron_tensors(dims: ModelShape) -> list[MegatronTensor]:
    """Every Megatron tensor (each layer and expert of it), in forward order, with the Hugging Face tensors in
    it.

    Gate and up are two chunks of ``linear_fc1`` in a checkpoint; here they are parts of one.
    """
    groups: dict[tuple[str, tuple[int, ...]], list[tuple[str, Place]]] = {}
    for name, parts_of_name in places(dims).items():
        for place in parts_of_name:
            groups.setdefault((place.key, place.at), []).append((name, place))
    tensors = []
    for (key, at), parts in groups.items():
        covered = sorted(r for _, place in parts for r in place.rows)
        assert covered[0][0] == 0 and all(a[1] == b[0] for a, b in pairwise(covered)), key
        first = parts[0][1]
        inner = first.shape[1:] if first.stack is None else first.shape[:1]
        tensors.append(MegatronTensor(key=key, at=at, shape=(covered[-1][1], *inner), parts=tuple(parts)))
    return tensors


def _place(slot: Slot, dims: ModelShape) -> Place:
    key, at = _key(slot, dims)
    return Place(key=key, at=at, rows=_rows(slot, dims), shape=slot.shape)


def _expert_place(slot: Slot, stack: Stack, number: int) -> Place:
    key, at = _expert_key(slot)
    _, inputs, outputs = stack.shape
    return Place(
        key=key,
        at=at,
        rows=((0, outputs),),
        shape=(inputs, outputs),
        stack=stack,
        begin=number * inputs * outputs,
    )


def _key(slot: Slot, dims: ModelShape) -> tuple[str, tuple[int, ...]]:
    if slot.part == "parameter":
        return slot.module, ()
    if slot.expert is not None:
        return _expert_key(slot)
    match = _LAYER.fullmatch(slot.module)
    if match is None:
        return f"{slot.module}.weight", ()
    inner = f"{match[2]}.weight"
    if dims.num_experts is None or match[2] != "pre_mlp_layernorm":  # no linear layer comes behind that one
        inner = _FUSED_NORMS.get(match[2], inner)
    return f"decoder.layers.{inner}", (int(match[1]),)


def _expert_key(slot: Slot) -> tuple[str, tuple[int, ...]]:
    match = _LAYER.fullmatch(slot.module)
    assert match is not None and slot.expert is not None
    experts, leaf = match[2].rsplit(".", 1)
    return f"decoder.layers.{experts}.experts.{leaf}.weight", (int(match[1]), slot.expert)


def _rows(slot: Slot, dims: ModelShape) -> tuple[tuple[int, int], ...]:
    size = slot.shape[0]
    if slot.part in ("gate", "up"):
        start = 0 if slot.part == "gate" else size
        return ((start, start + size),)
    if slot.part not in ("q", "k", "v"):
        return ((0, size),)
    head, per_group = dims.head_dim, dims.num_attention_heads // dims.num_query_groups
    first, count = {"q": (0, per_group), "k": (per_group, 1), "v": (per_group + 1, 1)}[slot.part]
    return tuple(
        ((group * (per_group + 2) + first) * head, (group * (per_group + 2) + first + count) * head)
        for group in range(dims.num_query_groups)
    )


def shape_from_record(record: Mapping[str, Any]) -> ModelShape:
    """``ModelShape`` from the mapping that a manifest holds."""
    values = dict(record)
    if values.get("vision") is not None:
        values["vision"] = VisionShape(**values["vision"])
    if values.get("mrope_section") is not None:
        values["mrope_section"] = tuple(values["mrope_section"])
    return ModelShape(**values)
