"""Live weights from Megatron to vLLM, without the disk.

vLLM's own loaders put the weights in place (fusing, padding, prepacking, quantising): they take tensors of
full Hugging Face shape and cut out their shard, which is exactly what ``ShardStream`` fills on each rank.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from copd_megatron.config.schema import WeightSyncConfig
from copd_megatron.policy.actor import MegatronActor
from copd_megatron.rollout.engine import RolloutEngine
from copd_megatron.weight_sync.stream import ShardStream


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
        self.actor, self.engine = actor, engine
        self.stream = ShardStream(actor, rollout_tp=engine.tp_size, bucket_bytes=config.bucket_bytes)

    def __call__(self) -> SyncReport:
        """Streams the actor's current weights into vLLM and stamps the engine with their version."""
        begin = time.perf_counter()
        # vLLM's layerwise reload keeps tensors beyond their bucket
        weights = self.stream.tensors(lasting=not self.engine.loads_in_place)
        self.engine.load_weights(weights, version=self.actor.version)
        return SyncReport(
            version=self.actor.version,
            seconds=time.perf_counter() - begin,
            loaded_bytes=self.stream.filled_bytes,
            received_bytes=self.stream.received_bytes,
        )
