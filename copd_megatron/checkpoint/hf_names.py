"""Hugging Face tensors inside Megatron's. Pure: no torch.

Megatron's distributed format knows neither tensor nor pipeline parallelism: a tensor is whole, layers are
stacked along a first axis, q, k and v of each query group lie together in ``linear_qkv``, gate and up in
``linear_fc1``. Every Hugging Face tensor is therefore some rows of one layer of one Megatron tensor, and
nothing else is needed to convert in either direction.

    model.layers.3.self_attn.k_proj.weight  =  decoder.layers.self_attention.linear_qkv.weight[3, rows]

with, for 8 query heads in 2 groups of head size 16, rows 64..80 and 160..176.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from copd_megatron.checkpoint.manifest import CheckpointError
from copd_megatron.config.model_shape import ModelShape, VisionShape
from copd_megatron.policy.hf_layout import Slot, slots

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
    layer: int | None
    """Index along the first axis; None: the tensor is not stacked."""
    rows: tuple[tuple[int, int], ...]
    """[start, stop) ranges of rows (behind the layer axis) that make it up, in order."""
    shape: tuple[int, ...]
    """The Hugging Face tensor's."""

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
    """A whole Megatron tensor, or one layer of a stacked one, and what it is made of."""

    key: str
    layer: int | None
    shape: tuple[int, ...]
    """Without the layer axis."""
    parts: tuple[tuple[str, Place], ...]
    """Hugging Face tensors that together cover its rows."""


def places(dims: ModelShape) -> dict[str, Place]:
    """Every Hugging Face tensor of the model, in forward order.

    Raises:
        CheckpointError: a mixture of experts, whose tensors Megatron stacks along an axis of their own.
    """
    if dims.num_experts is not None:
        raise CheckpointError(
            f"{dims.architecture}: converting checkpoints of a mixture of experts is not supported; the "
            "run's own export (end.export) writes them in Hugging Face's format"
        )
    return {slot.name: _place(slot, dims) for slot in slots(dims, 1)}


def num_stacked_layers(dims: ModelShape, key: str) -> int | None:
    """Size of the layer axis of a Megatron tensor; None: it has none."""
    return dims.num_layers if key.startswith("decoder.layers.") else None


def megatron_tensors(dims: ModelShape) -> list[MegatronTensor]:
    """Every Megatron tensor (each layer of it), in forward order, with the Hugging Face tensors in it.

    Gate and up are two chunks of ``linear_fc1`` in a checkpoint; here they are parts of one.
    """
    groups: dict[tuple[str, int | None], list[tuple[str, Place]]] = {}
    for name, place in places(dims).items():
        groups.setdefault((place.key, place.layer), []).append((name, place))
    tensors = []
    for (key, layer), parts in groups.items():
        covered = sorted(r for _, place in parts for r in place.rows)
        assert covered[0][0] == 0 and all(a[1] == b[0] for a, b in pairwise(covered)), key
        shape = (covered[-1][1], *parts[0][1].shape[1:])
        tensors.append(MegatronTensor(key=key, layer=layer, shape=shape, parts=tuple(parts)))
    return tensors


def _place(slot: Slot, dims: ModelShape) -> Place:
    key, layer = _key(slot)
    return Place(key=key, layer=layer, rows=_rows(slot, dims), shape=slot.shape)


def _key(slot: Slot) -> tuple[str, int | None]:
    if slot.part == "parameter":
        return slot.module, None
    match = _LAYER.fullmatch(slot.module)
    if match is None:
        return f"{slot.module}.weight", None
    inner = _FUSED_NORMS.get(match[2], f"{match[2]}.weight")
    return f"decoder.layers.{inner}", int(match[1])


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
