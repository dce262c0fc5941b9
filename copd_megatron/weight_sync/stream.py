"""The executor of a plan: a branch's live Megatron shards as a stream of Hugging Face tensors.

Each destination rank gets tensors of full Hugging Face shape in which just the rows that it wants are
filled; the rest is never transferred and must not be read. Memory: one bucket of such tensors, and at most
as much again for slices that are not contiguous where they come from or go to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from copd_megatron.policy.actor import MegatronActor
from copd_megatron.policy.hf_layout import Slot
from copd_megatron.weight_sync.plan import BranchLayout, Bucket, Transfer, plan_sync


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
            BranchLayout(
                tp=parallel.tensor_model_parallel_size,
                pp=parallel.pipeline_model_parallel_size,
                dp=parallel.data_parallel_size,
                rollout_tp=rollout_tp,
            ),
            bucket_bytes=bucket_bytes,
            element_bytes=self.dtype.itemsize,
            destinations=destinations,
        )
        self.receives = destinations is None or self.rank in destinations
        self._slots = {slot.name: slot for slot in actor.view.local if not slot.copy_of_embedding}
        self.filled_bytes = 0
        """Bytes put in place on this rank by the last pass."""
        self.received_bytes = 0
        """Of those, bytes that came from other ranks."""

    @torch.no_grad()
    def buckets_filled(self) -> Iterator[dict[str, Tensor]]:
        """One pass over the weights, bucket by bucket: Hugging Face name to tensor (empty on ranks that do
        not receive). Collective: all ranks of the branch must drain it in step."""
        self.filled_bytes = self.received_bytes = 0
        for bucket in self.buckets:
            yield self._fill(bucket)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """``buckets_filled``, one tensor at a time."""
        for bucket in self.buckets_filled():
            yield from bucket.items()

    def _fill(self, bucket: Bucket) -> dict[str, Tensor]:
        device = self.actor.device
        filled: dict[str, Tensor] = {}
        if self.receives:
            filled = {
                slot.name: torch.empty(slot.shape, dtype=self.dtype, device=device) for slot in bucket.slots
            }
        shares: dict[str, Tensor] = {}
        operations: list[dist.P2POp] = []
        arriving: list[tuple[Tensor, Tensor]] = []
        for transfer in bucket.transfers:
            if transfer.src == self.rank:
                piece = self._piece(shares, transfer)
                if transfer.dst != self.rank:
                    operations.append(dist.P2POp(dist.isend, piece.contiguous(), transfer.dst))
            if transfer.dst == self.rank:
                place = _rows(filled[transfer.slot.name], transfer.slot, transfer.start, transfer.stop)
                num_bytes = place.numel() * place.element_size()
                self.filled_bytes += num_bytes
                if transfer.src == self.rank:
                    place.copy_(piece)
                    continue
                self.received_bytes += num_bytes
                landing = (
                    place
                    if place.is_contiguous()
                    else torch.empty(place.shape, dtype=self.dtype, device=device)
                )
                if landing is not place:
                    arriving.append((place, landing))
                operations.append(dist.P2POp(dist.irecv, landing, transfer.src))
        if operations:
            for work in dist.batch_isend_irecv(operations):
                work.wait()
        for place, landing in arriving:
            place.copy_(landing)
        return filled

    def _piece(self, shares: dict[str, Tensor], transfer: Transfer) -> Tensor:
        """The rows of this rank's share that a transfer carries; a share is read once per bucket."""
        name = transfer.slot.name
        if name not in shares:
            shares[name] = self.actor.view.read(self._slots[name])
        if transfer.start is None or transfer.stop is None:
            return shares[name]
        first, _ = transfer.slot.range_of(self.actor.tp_rank, self.actor.view.tp_size)
        return _rows(shares[name], transfer.slot, transfer.start - first, transfer.stop - first)


def _rows(tensor: Tensor, slot: Slot, start: int | None, stop: int | None) -> Tensor:
    if slot.dim is None or start is None or stop is None:
        return tensor
    return tensor.narrow(slot.dim, start, stop - start)
