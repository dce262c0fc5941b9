"""The executor of a plan: a branch's live Megatron shards as a stream of Hugging Face tensors.

Each destination rank gets tensors of full Hugging Face shape in which only the rows that it wants are filled;
the rest is never transferred and must not be read. What a rank holds in that form already is passed on as it
is.

Memory: one bucket of such tensors, and at most as much again for slices that are not contiguous at their
source or destination. It is allocated once per pass and reused for every bucket, because fresh memory costs
more time (a page fault every 4 KiB on CPU) than copying into it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from copd_megatron.model.slots import Slot
from copd_megatron.policy.actor import MegatronActor
from copd_megatron.weight_sync.plan import Bucket, SyncLayout, Transfer, plan_sync


class ShardStream:
    """Streams one actor's weights to the ranks of its branch."""

    def __init__(
        self,
        actor: MegatronActor,
        *,
        rollout_tp: int,
        bucket_bytes: int,
        destinations: Sequence[int] | None = None,
    ) -> None:
        """``destinations``: branch ranks that receive, None for all; ``rollout_tp``: how many of them, in
        turn, share one copy of the model."""
        parallel = actor.parallel
        self.actor = actor
        self.rank = dist.get_rank()
        self.dtype = actor.config.params_dtype
        self.buckets = plan_sync(
            actor.dims,
            SyncLayout(
                tp=parallel.tensor_model_parallel_size,
                pp=parallel.pipeline_model_parallel_size,
                dp=parallel.context_parallel_size * parallel.data_parallel_size,
                rollout_tp=rollout_tp,
                vpp=parallel.virtual_pipeline_model_parallel_size,
                ep=parallel.expert_model_parallel_size,
            ),
            bucket_bytes=bucket_bytes,
            element_bytes=self.dtype.itemsize,
            destinations=destinations,
        )
        self._transfers = [
            [transfer for transfer in bucket.transfers if self.rank in (transfer.src, transfer.dst)]
            for bucket in self.buckets
        ]
        """This rank's part of each bucket: a mixture on many ranks has hundreds of thousands in all."""
        self.receives = destinations is None or self.rank in destinations
        self._slots = {slot.name: slot for slot in actor.view.local if not slot.copy_of_embedding}
        self.filled_bytes = 0
        """Bytes put in place on this rank by the last pass."""
        self.received_bytes = 0
        """Of those, bytes that came from other ranks."""

    @torch.no_grad()
    def buckets_filled(self, *, lasting: bool = False) -> Iterator[dict[str, Tensor]]:
        """One pass over the weights, bucket by bucket: Hugging Face name to tensor (empty on ranks that do
        not receive). Collective: all ranks of the branch must drain it in step.

        A bucket's tensors hold until the next is asked for; with ``lasting`` each has memory of its own.
        They may be the actor's own parameters: read them only.
        """
        self.filled_bytes = self.received_bytes = 0
        self.actor.take_weights()
        arena = _Arena(self.dtype, self.actor.device)
        for bucket, transfers in zip(self.buckets, self._transfers, strict=True):
            arena.reuse(lasting=lasting)
            yield self._fill(bucket, transfers, arena)

    def tensors(self, *, lasting: bool = False) -> Iterator[tuple[str, Tensor]]:
        """``buckets_filled``, one tensor at a time."""
        for bucket in self.buckets_filled(lasting=lasting):
            yield from bucket.items()

    def _fill(self, bucket: Bucket, transfers: Sequence[Transfer], arena: _Arena) -> dict[str, Tensor]:
        filled: dict[str, Tensor] = {}
        shares: dict[str, Tensor] = {}
        operations: list[dist.P2POp] = []
        arriving: list[tuple[Tensor, Tensor]] = []
        for transfer in transfers:
            name = transfer.slot.name
            if transfer.src == self.rank:
                piece = self._piece(shares, transfer, arena)
                if transfer.dst != self.rank:
                    operations.append(dist.P2POp(dist.isend, piece.contiguous(), transfer.dst))
            if transfer.dst != self.rank:
                continue
            if transfer.src == self.rank and piece.shape == transfer.slot.shape:
                filled[name] = piece
                self.filled_bytes += piece.numel() * piece.element_size()
                continue
            if name not in filled:
                filled[name] = arena.take(transfer.slot.shape)
            place = _rows(filled[name], transfer.slot, transfer.start, transfer.stop)
            num_bytes = place.numel() * place.element_size()
            self.filled_bytes += num_bytes
            if transfer.src == self.rank:
                place.copy_(piece)
                continue
            self.received_bytes += num_bytes
            landing = place if place.is_contiguous() else arena.take(tuple(place.shape))
            if landing is not place:
                arriving.append((place, landing))
            operations.append(dist.P2POp(dist.irecv, landing, transfer.src))
        if operations:
            for work in dist.batch_isend_irecv(operations):
                work.wait()
        for place, landing in arriving:
            place.copy_(landing)
        if not self.receives:
            return {}
        # a vLLM rank that keeps no row of a small vocabulary still has to be told of the tensor
        return {
            slot.name: filled[slot.name] if slot.name in filled else arena.take(slot.shape)
            for slot in bucket.slots
        }

    def _piece(self, shares: dict[str, Tensor], transfer: Transfer, arena: _Arena) -> Tensor:
        """The rows of this rank's share that a transfer carries; a share is read once per bucket."""
        name = transfer.slot.name
        if name not in shares:
            shares[name] = self.actor.view.read(self._slots[name], arena.take)
        if transfer.start is None or transfer.stop is None:
            return shares[name]
        first, _ = transfer.slot.range_of(self.actor.tp_rank, self.actor.view.tp_size)
        return _rows(shares[name], transfer.slot, transfer.start - first, transfer.stop - first)


class _Arena:
    """Memory that is reused for one bucket after the other."""

    _ALIGNMENT = 64
    """Elements."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._blocks: list[Tensor] = []
        self._needed = self._used = 0

    def reuse(self, *, lasting: bool) -> None:
        """Takes back what was handed out (with ``lasting``, leaves it to its holders)."""
        if lasting:
            self._blocks = []
        elif len(self._blocks) > 1 or self._needed > sum(block.numel() for block in self._blocks):
            self._blocks = []  # given back before one block of the size that was needed takes its place
            self._blocks = [torch.empty(self._needed, dtype=self._dtype, device=self._device)]
        self._needed = self._used = 0

    def take(self, shape: tuple[int, ...]) -> Tensor:
        """Uninitialised contiguous memory of this shape."""
        size = math.prod(shape)
        padded = math.ceil(size / self._ALIGNMENT) * self._ALIGNMENT
        self._needed += padded
        if not self._blocks or self._used + padded > self._blocks[-1].numel():
            self._blocks.append(torch.empty(padded, dtype=self._dtype, device=self._device))
            self._used = 0
        begin, self._used = self._used, self._used + padded
        return self._blocks[-1][begin : begin + size].view(shape)


def _rows(tensor: Tensor, slot: Slot, start: int | None, stop: int | None) -> Tensor:
    if slot.dim is None or start is None or stop is None:
        return tensor
    return tensor.narrow(slot.dim, start, stop - start)
