"""The executor of a weight-sync plan: live Megatron shards into live vLLM shards, bucket by bucket.

vLLM's own loaders do the placing (fusing, padding, prepacking, quantising): they take tensors of full
Hugging Face shape and cut out their shard. Here each rank fills just the rows that its shard keeps; the
rest of such a tensor is never transferred and never read.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from copd_megatron.config.schema import WeightSyncConfig
from copd_megatron.policy.actor import MegatronActor
from copd_megatron.policy.hf_layout import Slot
from copd_megatron.rollout.engine import RolloutEngine
from copd_megatron.weight_sync.plan import BranchLayout, Bucket, Transfer, plan_sync


@dataclass(frozen=True, kw_only=True)
class SyncReport:
    """What one sync did on this rank."""

    version: int
    seconds: float
    loaded_bytes: int
    """Bytes that this rank's vLLM shard took in."""
    received_bytes: int
    """Of those, the bytes that came from other ranks."""


class WeightSync:
    """Keeps one branch's vLLM workers at its actor's weights. Collective over the branch."""

    def __init__(self, actor: MegatronActor, engine: RolloutEngine, config: WeightSyncConfig) -> None:
        parallel = actor.parallel
        self.actor, self.engine = actor, engine
        self.rank = dist.get_rank()
        self.dtype = actor.config.params_dtype
        self.buckets = plan_sync(
            actor.dims,
            BranchLayout(
                tp=parallel.tensor_model_parallel_size,
                pp=parallel.pipeline_model_parallel_size,
                dp=parallel.data_parallel_size,
                rollout_tp=engine.tp_size,
            ),
            bucket_bytes=config.bucket_bytes,
            element_bytes=self.dtype.itemsize,
        )
        self._slots = {slot.name: slot for slot in actor.view.local if not slot.copy_of_embedding}
        self._loaded = self._received = 0

    def __call__(self) -> SyncReport:
        """Streams the actor's current weights into vLLM and stamps the engine with their version."""
        begin = time.perf_counter()
        self._loaded = self._received = 0
        self.engine.load_weights(self.stream(), version=self.actor.version)
        return SyncReport(
            version=self.actor.version,
            seconds=time.perf_counter() - begin,
            loaded_bytes=self._loaded,
            received_bytes=self._received,
        )

    @torch.no_grad()
    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, tensor of full shape with this rank's rows filled), bucket by bucket.

        Must be drained in step by all ranks of the branch.
        """
        for bucket in self.buckets:
            yield from self._fill(bucket).items()

    def _fill(self, bucket: Bucket) -> dict[str, Tensor]:
        device = self.actor.device
        filled = {slot.name: torch.empty(slot.shape, dtype=self.dtype, device=device) for slot in bucket.slots}
        shares: dict[str, Tensor] = {}
        operations: list[dist.P2POp] = []
        arriving: list[tuple[Tensor, Tensor]] = []
        for transfer in bucket.transfers:
            if self.rank not in (transfer.src, transfer.dst):
                continue
            slot = transfer.slot
            if transfer.src == self.rank:
                if slot.name not in shares:
                    shares[slot.name] = self.actor.view.read(self._slots[slot.name])
                piece = self._piece(shares[slot.name], transfer)
            if transfer.dst == self.rank:
                place = _rows(filled[slot.name], slot, transfer.start, transfer.stop)
                self._loaded += place.numel() * place.element_size()
                if transfer.src == self.rank:
                    place.copy_(piece)
                    continue
                self._received += place.numel() * place.element_size()
                landing = place if place.is_contiguous() else torch.empty_like(place).contiguous()
                if landing is not place:
                    arriving.append((place, landing))
                operations.append(dist.P2POp(dist.irecv, landing, transfer.src))
            else:
                operations.append(dist.P2POp(dist.isend, piece.contiguous(), transfer.dst))
        if operations:
            for work in dist.batch_isend_irecv(operations):
                work.wait()
        for place, landing in arriving:
            place.copy_(landing)
        return filled

    def _piece(self, share: Tensor, transfer: Transfer) -> Tensor:
        """The rows of this rank's share that a transfer carries."""
        if transfer.start is None or transfer.stop is None:
            return share
        first, _ = transfer.slot.range_of(self.actor.tp_rank, self.actor.view.tp_size)
        return _rows(share, transfer.slot, transfer.start - first, transfer.stop - first)


def _rows(tensor: Tensor, slot: Slot, start: int | None, stop: int | None) -> Tensor:
    if slot.dim is None or start is None or stop is None:
        return tensor
    return tensor.narrow(slot.dim, start, stop - start)
