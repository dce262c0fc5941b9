"""Hugging Face tensors in a Megatron shard, read and written in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from torch import Tensor, nn

from copd_megatron.hf.folder import HFFolder
from copd_megatron.model.fused import FUSED_NORMS, rows_of_part
from copd_megatron.model.shape import ModelShape
from copd_megatron.model.slots import Slot, expert_owner, slots


class ShardView:
    """This rank's share of every Hugging Face tensor of its pipeline stage.

    The views alias the parameters: reading sees the live weights, writing changes them.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        dims: ModelShape,
        *,
        tp_rank: int,
        tp_size: int,
        pp_rank: int,
        pp_size: int,
        ep_rank: int = 0,
        ep_size: int = 1,
    ) -> None:
        """``chunks`` are the model chunks of this rank's pipeline stage, one without virtual pipeline."""
        self.dims, self.tp_rank, self.tp_size = dims, tp_rank, tp_size
        self.pp_rank, self.pp_size = pp_rank, pp_size
        self._chunks = chunks
        self._first_expert = ep_rank * (dims.num_experts or 0) // ep_size
        self.table = slots(dims, pp_size, len(chunks))
        self.local = [
            slot
            for slot in self.table
            if slot.stage == pp_rank
            and (slot.expert is None or expert_owner(slot.expert, dims.num_experts or 0, ep_size) == ep_rank)
        ]

    def _parameter(self, slot: Slot) -> nn.Parameter:
        """The Megatron parameter behind a slot, under the name that this machine's layers give it: the slot
        table names modules as Megatron's own layers do, Transformer Engine's fuse norms and group experts."""
        model = self._chunks[slot.chunk]
        if slot.part == "parameter":
            return model.get_parameter(slot.module)
        layer, _, leaf = slot.module.rpartition(".")
        if slot.expert is not None:
            local = slot.expert - self._first_expert
            path = f"{layer}.local_experts.{local}.{leaf}.weight"
            # Transformer Engine's grouped linear holds its experts' weights side by side
            return model.get_parameter(path if _has_weight(model, path) else f"{slot.module}.weight{local}")
        path = f"{slot.module}.weight"
        if leaf in FUSED_NORMS and not _has_weight(model, path):
            path = f"{layer}.{FUSED_NORMS[leaf]}"
        return model.get_parameter(path)

    def _view(self, slot: Slot) -> Tensor:
        """A (possibly strided) view whose elements, in order, are this rank's share of the tensor; of a copy
        where the parameter is kept in FP8."""
        weight = plain(self._parameter(slot))
        if slot.pads_vocabulary:
            start, stop = slot.range_of(self.tp_rank, self.tp_size)
            return weight[: stop - start]
        rows = rows_of_part(slot.part, len(weight), self.dims)
        if rows.stop - rows.start == len(weight):
            return weight
        return weight.unflatten(0, (-1, rows.period))[:, rows.start : rows.stop]

    def local_shape(self, slot: Slot) -> tuple[int, ...]:
        """Shape of this rank's share."""
        shape = list(slot.shape)
        if slot.dim is not None:
            start, stop = slot.range_of(self.tp_rank, self.tp_size)
            shape[slot.dim] = stop - start
        return tuple(shape)

    def read(self, slot: Slot, allocate: Callable[[tuple[int, ...]], Tensor] | None = None) -> Tensor:
        """This rank's share, in Hugging Face layout; a copy only where the parameter is fused.

        ``allocate`` gives the memory for such a copy; None: torch does.
        """
        view, shape = self._view(slot), self.local_shape(slot)
        if allocate is None or view.is_contiguous():
            return view.reshape(shape)
        copy = allocate(shape)
        copy.view(view.shape).copy_(view)
        return copy

    def write(self, slot: Slot, value: Tensor) -> None:
        """Sets this rank's share (in Hugging Face layout)."""
        parameter, view = self._parameter(slot), self._view(slot)
        view.copy_(value.reshape(view.shape))
        if is_float8tensor(parameter):
            whole = view
            while whole._base is not None:
                whole = whole._base
            parameter.data.copy_(whole)  # quantises


def plain(parameter: Tensor) -> Tensor:
    """A parameter's values: itself, or a copy of what an FP8 one stands for."""
    return dequantize_fp8_tensor(parameter) if is_float8tensor(parameter) else parameter.data


def _has_weight(model: nn.Module, path: str) -> bool:
    try:
        model.get_parameter(path)
    except AttributeError:
        return False
    return True


@torch.no_grad()
def load_hf(view: ShardView, folder: str | Path) -> None:
    """Fills a Megatron shard from a Hugging Face folder; each rank reads only its own slices.

    Raises:
        KeyError, ValueError: the folder lacks a tensor, or one has another shape than config.json says.
    """
    source = HFFolder(folder)
    for slot in view.local:
        if slot.stack is not None and slot.expert is not None:
            value = source.read_expert(slot.stack, slot.expert)
        elif slot.dim is None:
            value = source.read(slot.name)
        else:
            start, stop = slot.range_of(view.tp_rank, view.tp_size)
            value = source.read(slot.name, slot.dim, start, stop)
        if tuple(value.shape) != view.local_shape(slot):
            raise ValueError(
                f"{source.folder}: {slot.name} gives {tuple(value.shape)} on tensor-parallel rank "
                f"{view.tp_rank}, config.json implies {view.local_shape(slot)}"
            )
        view.write(slot, value)
