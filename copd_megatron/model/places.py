"""Hugging Face tensors inside a Megatron checkpoint's. Pure: no torch.

Megatron's distributed format knows neither tensor nor pipeline parallelism: a tensor is whole, and layers
(and their experts) are stacked along first axes. Every Hugging Face tensor is therefore some rows of one
layer of one Megatron tensor; ``fused`` says which. Nothing else is needed to convert in either direction.

    model.layers.3.self_attn.k_proj.weight  =  decoder.layers.self_attention.linear_qkv.weight[3, rows]

with, for 8 query heads in 2 groups of head size 16, rows 64..80 and 160..176.

Every expert has a name of its own here, also where a Hugging Face folder stacks them (see ``slots.Stack``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise

from copd_megatron.model.fused import FUSED_NORMS, rows_of_part
from copd_megatron.model.shape import ModelShape
from copd_megatron.model.slots import Slot, slots

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True, kw_only=True)
class TensorPlace:
    """Where a Hugging Face tensor lies in a Megatron checkpoint."""

    key: str
    """Megatron's name."""
    at: tuple[int, ...]
    """Index along the first axes: layer, then expert; empty: the tensor is not stacked."""
    rows: tuple[tuple[int, int], ...]
    """[start, stop) ranges of rows (behind those axes) that make it up, in order."""
    shape: tuple[int, ...]
    """The Hugging Face tensor's."""

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
    parts: tuple[tuple[str, TensorPlace], ...]
    """Hugging Face tensors that together cover its rows."""


def places(dims: ModelShape) -> dict[str, TensorPlace]:
    """Every Hugging Face tensor of the model, each expert's by itself, in forward order."""
    return {slot.name: _place(slot, dims) for slot in slots(dims, 1)}


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
    groups: dict[tuple[str, tuple[int, ...]], list[tuple[str, TensorPlace]]] = {}
    for name, place in places(dims).items():
        groups.setdefault((place.key, place.at), []).append((name, place))
    tensors = []
    for (key, at), parts in groups.items():
        covered = sorted(r for _, place in parts for r in place.rows)
        assert covered[0][0] == 0 and all(a[1] == b[0] for a, b in pairwise(covered)), key
        shape = (covered[-1][1], *parts[0][1].shape[1:])
        tensors.append(MegatronTensor(key=key, at=at, shape=shape, parts=tuple(parts)))
    return tensors


def _place(slot: Slot, dims: ModelShape) -> TensorPlace:
    key, at = _key(slot, dims)
    return TensorPlace(key=key, at=at, rows=_rows(slot, dims), shape=slot.shape)


def _key(slot: Slot, dims: ModelShape) -> tuple[str, tuple[int, ...]]:
    if slot.part == "parameter":
        return slot.module, ()
    match = _LAYER.fullmatch(slot.module)
    if match is None:
        return f"{slot.module}.weight", ()
    layer, module = int(match[1]), match[2]
    if slot.expert is not None:
        experts, leaf = module.rsplit(".", 1)
        return f"decoder.layers.{experts}.experts.{leaf}.weight", (layer, slot.expert)
    stays = dims.num_experts is not None and module == "pre_mlp_layernorm"
    inner = f"{module}.weight" if stays else FUSED_NORMS.get(module, f"{module}.weight")
    return f"decoder.layers.{inner}", (layer,)


def _rows(slot: Slot, dims: ModelShape) -> tuple[tuple[int, int], ...]:
    """Rows of the Megatron tensor, which are as many as those of all its parts."""
    num_rows = slot.shape[0]
    if slot.part in ("q", "k", "v"):
        num_rows = (dims.num_attention_heads + 2 * dims.num_query_groups) * dims.head_dim
    elif slot.part in ("gate", "up"):
        num_rows *= 2
    return rows_of_part(slot.part, num_rows, dims).ranges(num_rows)
