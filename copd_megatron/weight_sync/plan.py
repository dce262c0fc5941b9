"""Which slice of which tensor travels from which rank to which rank in a weight sync. Pure.

Source: a Megatron branch at TP x PP x DP, every Hugging Face tensor split as ``model.slots`` says.
Destination: the same ranks as vLLM workers with a tensor parallelism of their own; the branch then holds
several replicas of the rollout model. Each destination rank receives exactly the rows that its vLLM shard
keeps, except those that it owns already as a Megatron rank.

Megatron orders the ranks of a branch by tensor parallelism first (fastest), then data, then pipeline.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from copd_megatron.model.shape import ModelShape
from copd_megatron.model.slots import Slot, expert_owner, slots

VLLM_VOCAB_PADDING = 64
"""vLLM pads the vocabulary to a multiple of this before splitting it."""


@dataclass(frozen=True, kw_only=True)
class SyncLayout:
    """Sizes of a branch's two layouts."""

    tp: int
    pp: int
    dp: int
    """Context times data parallel: each holds a copy of the weights."""
    rollout_tp: int
    vpp: int = 1
    ep: int = 1
    """Expert parallel: which of the tp x dp ranks of a stage share the experts."""

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(tp, dp, pp) coordinates of a branch rank."""
        return rank % self.tp, rank // self.tp % self.dp, rank // (self.tp * self.dp)

    def rank_at(self, tp: int, dp: int, pp: int) -> int:
        """Branch rank at given coordinates."""
        return (pp * self.dp + dp) * self.tp + tp


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Rows [start, stop) along the slot's ``dim`` go from ``src`` to ``dst`` (branch ranks).

    A replicated tensor travels whole: ``start`` and ``stop`` are None. ``src == dst`` is a local copy.
    """

    slot: Slot
    src: int
    dst: int
    start: int | None
    stop: int | None


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Tensors that are in flight together."""

    slots: tuple[Slot, ...]
    transfers: tuple[Transfer, ...]
    """In an order that every rank follows."""


def wanted_range(slot: Slot, dims: ModelShape, rollout_rank: int, rollout_tp: int) -> tuple[int, int] | None:
    """Rows along ``slot.dim`` that vLLM's tensor-parallel rank keeps; None: the whole tensor."""
    if slot.dim is None:
        return None
    size = slot.shape[slot.dim]
    if slot.pads_vocabulary:
        share = math.ceil(size / VLLM_VOCAB_PADDING) * VLLM_VOCAB_PADDING // rollout_tp
    elif slot.part in ("k", "v") and rollout_tp > dims.num_query_groups:
        # vLLM replicates key/value heads over ranks when there are fewer heads than ranks
        head = rollout_rank * dims.num_query_groups // rollout_tp
        return head * dims.head_dim, (head + 1) * dims.head_dim
    else:
        share = size // rollout_tp
    return min(rollout_rank * share, size), min((rollout_rank + 1) * share, size)


def plan_sync(
    dims: ModelShape,
    layout: SyncLayout,
    *,
    bucket_bytes: int,
    element_bytes: int,
    destinations: Sequence[int] | None = None,
) -> list[Bucket]:
    """Buckets in streaming order: a deterministic function of the arguments, the same on all ranks.

    ``destinations`` are the branch ranks that receive; None: all of them. An export to one rank is a sync
    with ``rollout_tp=1`` and one destination.

    Tensors that vLLM fuses into one parameter share a bucket, because its loader keeps them until the
    parameter is complete. A bucket holds at most ``bucket_bytes`` of full tensors, unless a single fused
    parameter is larger than that.

    Raises:
        ValueError: the rollout layout does not divide the branch or the model.
    """
    _check(dims, layout)
    receivers = range(layout.world_size) if destinations is None else destinations
    groups: dict[str, list[Slot]] = {}
    for slot in slots(dims, layout.pp, layout.vpp):
        if not slot.copy_of_embedding:
            groups.setdefault(slot.group, []).append(slot)
    buckets: list[Bucket] = []
    waiting: list[Slot] = []
    size = 0
    for group in groups.values():
        group_bytes = sum(math.prod(slot.shape) for slot in group) * element_bytes
        if waiting and size + group_bytes > bucket_bytes:
            buckets.append(_bucket(waiting, dims, layout, receivers))
            waiting, size = [], 0
        waiting += group
        size += group_bytes
    buckets.append(_bucket(waiting, dims, layout, receivers))
    return buckets


def _bucket(
    members: Sequence[Slot], dims: ModelShape, layout: SyncLayout, receivers: Sequence[int]
) -> Bucket:
    transfers = []
    for slot in members:
        for dst in receivers:
            wanted = wanted_range(slot, dims, dst % layout.rollout_tp, layout.rollout_tp)
            if wanted is None:
                src = _source(slot, None, dst, layout)
                if slot.expert is not None:
                    owner = expert_owner(slot.expert, dims.num_experts or 0, layout.ep)
                    src = _expert_source(owner, dst, slot.stage, layout)
                transfers.append(Transfer(slot=slot, src=src, dst=dst, start=None, stop=None))
                continue
            for tp in range(layout.tp):
                owned = slot.range_of(tp, layout.tp)
                start, stop = max(owned[0], wanted[0]), min(owned[1], wanted[1])
                if start < stop:
                    src = _source(slot, tp, dst, layout)
                    transfers.append(Transfer(slot=slot, src=src, dst=dst, start=start, stop=stop))
    return Bucket(slots=tuple(members), transfers=tuple(transfers))


def _source(slot: Slot, tp: int | None, dst: int, layout: SyncLayout) -> int:
    """The rank that serves ``dst``: of the data-parallel copies (and of the tensor-parallel ones, if the
    tensor is replicated: ``tp`` None), the one at the destination's own coordinates. A rank serves itself
    where it can, and the copies share the rest evenly."""
    own_tp, dp, _ = layout.coordinates(dst)
    return layout.rank_at(own_tp if tp is None else tp, dp, slot.stage)


def _expert_source(owner: int, dst: int, stage: int, layout: SyncLayout) -> int:
    """The rank that serves ``dst`` with an expert of expert-parallel rank ``owner``: the one in the group of
    ``ep`` neighbours that stands at the destination's place in its stage."""
    per_stage = layout.tp * layout.dp
    return stage * per_stage + dst % per_stage // layout.ep * layout.ep + owner


def _check(dims: ModelShape, layout: SyncLayout) -> None:
    if layout.rollout_tp < 1 or layout.world_size % layout.rollout_tp:
        raise ValueError(
            f"rollout.tensor_parallel_size={layout.rollout_tp} must divide the branch's "
            f"{layout.world_size} ranks"
        )
    width = dims.ffn_hidden_size if dims.num_experts is None else dims.expert_ffn_size
    if dims.num_attention_heads % layout.rollout_tp or width % layout.rollout_tp:
        raise ValueError(
            f"rollout.tensor_parallel_size={layout.rollout_tp} must divide the model's "
            f"{dims.num_attention_heads} attention heads and {width} feed-forward rows"
        )
    fewer, more = sorted((dims.num_query_groups, layout.rollout_tp))
    if more % fewer:
        raise ValueError(
            f"rollout.tensor_parallel_size={layout.rollout_tp} must divide, or be a multiple of, the model's "
            f"{dims.num_query_groups} key/value heads"
        )
