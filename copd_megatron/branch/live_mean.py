"""The mean of the branches' present weights, from live actors into live engines, without the disk.

The first ranks of the branches exchange one bucket of full tensors at a time and average it in float64; each
hands the mean to the ranks of its branch. Memory on a first rank: one bucket for each branch and its mean in
float64; on the others, one tensor.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from copd_megatron.branch.state import Branch
from copd_megatron.weight_sync.plan import Bucket
from copd_megatron.weight_sync.stream import ShardStream

_TAG = 1 << 30
"""Of the messages between first ranks; far above those of the exchange of rollouts."""


def load_live_mean(me: Branch, branches: Sequence[str]) -> bool:
    """Puts the mean of these branches' weights into their engines (version -1: not the actor's). Collective
    over all ranks of all branches.

    Returns False, having done nothing, where the branches do not stream the same tensors in the same buckets,
    because their pipelines differ for example.
    """
    stream = _stream(me) if me.name in branches else None
    plans = me.world.all_gather_objects(_digest(stream), "weight_sync.plan")
    if len(set(plans) - {""}) != 1:
        return False
    if stream is not None:
        assert me.engine is not None
        leads = [me.world.branch_ranks[name][0] for name in branches]
        with me.world.watch.operation("weight_sync.mean"):
            me.engine.load_weights(_tensors(me, stream, leads), version=-1)
    return True


def _stream(me: Branch) -> ShardStream:
    return ShardStream(
        me.actor, rollout_tp=1, bucket_bytes=me.config.weight_sync.bucket_bytes, destinations=(0,)
    )


def _digest(stream: ShardStream | None) -> str:
    """Of the tensors that a stream sends, bucket by bucket; empty without a stream."""
    if stream is None:
        return ""
    plan = [[(slot.name, tuple(slot.shape)) for slot in bucket.slots] for bucket in stream.buckets]
    return hashlib.sha256(repr((stream.dtype, plan)).encode()).hexdigest()


def _tensors(me: Branch, stream: ShardStream, leads: Sequence[int]) -> Iterator[tuple[str, Tensor]]:
    """The mean, tensor by tensor, on every rank of the branch."""
    for bucket, filled in zip(stream.buckets, stream.buckets_filled(), strict=True):
        mean = _mean(me, bucket, filled, leads) if me.world.is_branch_first else {}
        for slot in bucket.slots:
            tensor = mean.get(slot.name)
            if tensor is None:
                tensor = torch.empty(slot.shape, dtype=stream.dtype)
            tensor = tensor.to(stream.actor.device)
            dist.broadcast(tensor, 0)
            yield slot.name, tensor


def _mean(
    me: Branch, bucket: Bucket, filled: Mapping[str, Tensor], leads: Sequence[int]
) -> dict[str, Tensor]:
    """The mean over the leads' buckets, summed in their order, so that all of them get the same."""
    mine = torch.cat([filled[slot.name].reshape(-1).cpu() for slot in bucket.slots])
    parts = {lead: mine if lead == me.world.rank else torch.empty_like(mine) for lead in leads}
    others = [lead for lead in leads if lead != me.world.rank]
    router = me.world.router
    pending = [router.recv([parts[lead].view(torch.uint8)], lead, _TAG) for lead in others]
    pending += [router.send([mine.view(torch.uint8)], lead, _TAG) for lead in others]
    for work in pending:
        work.wait()
    total = torch.zeros(mine.shape, dtype=torch.float64)
    for lead in leads:
        total += parts[lead].double() / len(leads)
    pieces = total.to(mine.dtype).split([math.prod(slot.shape) for slot in bucket.slots])
    return {slot.name: piece.view(slot.shape) for slot, piece in zip(bucket.slots, pieces, strict=True)}
