"""How Megatron fuses tensors of a Hugging Face folder. Pure: no torch.

``linear_qkv`` holds, for each query group, the rows of its query heads, of its key head and of its value
head; ``linear_fc1`` holds the rows of gate, then those of up. Under tensor parallelism a rank holds whole
query groups, and its shares of gate and of up: the rules are the same for a parameter and for a rank's part.

Transformer Engine keeps the weight of a norm in the linear layer behind it, and so does every checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from copd_megatron.model.shape import ModelShape

FUSED_NORMS: Final[Mapping[str, str]] = {
    "input_layernorm": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm": "mlp.linear_fc1.layer_norm_weight",
}
"""A norm of a layer to the parameter that holds its weight where it is fused. In a mixture of experts no
linear layer comes behind ``pre_mlp_layernorm``: it stays by itself."""


@dataclass(frozen=True, kw_only=True)
class FusedRows:
    """The rows of a fused parameter that one part of it owns: [start, stop) of every ``period`` rows."""

    period: int
    start: int
    stop: int

    def ranges(self, num_rows: int) -> tuple[tuple[int, int], ...]:
        """[start, stop) ranges in a parameter of ``num_rows`` rows."""
        return tuple((first + self.start, first + self.stop) for first in range(0, num_rows, self.period))


def rows_of_part(part: str, num_rows: int, dims: ModelShape) -> FusedRows:
    """Where a part lies in its parameter.

    Args:
        part: as ``Slot.part`` has it; what is not fused owns all rows.
        num_rows: of the parameter, or of a rank's share of it.
    """
    if part in ("q", "k", "v"):
        head, per_group = dims.head_dim, dims.num_attention_heads // dims.num_query_groups
        first, count = {"q": (0, per_group), "k": (per_group, 1), "v": (per_group + 1, 1)}[part]
        return FusedRows(period=(per_group + 2) * head, start=first * head, stop=(first + count) * head)
    if part in ("gate", "up"):
        half = num_rows // 2
        first = half if part == "up" else 0
        return FusedRows(period=num_rows, start=first, stop=first + half)
    return FusedRows(period=num_rows, start=0, stop=num_rows)
