"""A live actor to a Hugging Face folder that transformers and vLLM load."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor

from copd_megatron.hf.appear import appear, partial_of
from copd_megatron.hf.companions import copy_companions, set_dtype, shard_name, write_index
from copd_megatron.hf.dtypes import dtype_name
from copd_megatron.hf.planned_file import write_safetensors
from copd_megatron.model.slots import Slot
from copd_megatron.policy.actor import MegatronActor
from copd_megatron.weight_sync.stream import ShardStream

SHARD_BYTES: Final = 2 * 2**30


def export_hf(
    actor: MegatronActor, folder: str | Path, *, source: str | Path, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes the actor's weights with the configuration, tokenizer and processor files of ``source``.

    Collective over the branch; branch rank 0 writes, holding one shard of ``shard_bytes`` at a time. The
    folder appears under its name only when it is complete.

    Raises:
        OSError: the folder cannot be written (disk full, no permission); what stood there before stays.
    """
    target = Path(folder)
    partial = partial_of(target)
    stream = ShardStream(actor, rollout_tp=1, bucket_bytes=shard_bytes, destinations=(0,))
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        copy_companions(Path(source), partial)
    where: dict[str, str] = {}
    total = 0
    for number, (bucket, filled) in enumerate(zip(stream.buckets, stream.buckets_filled(), strict=True), 1):
        if not first:
            continue
        file = shard_name(number, len(stream.buckets))
        tensors = as_stored(bucket.slots, filled)
        write_safetensors(partial / file, tensors)
        where |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if first:
        write_index(partial, where, total)
        set_dtype(partial, dtype_name(stream.dtype))
        appear(partial, target)
    dist.barrier()


def as_stored(slots: Sequence[Slot], filled: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A bucket's tensors in host memory, under the names and in the shapes of a Hugging Face folder."""
    stored: dict[str, Tensor] = {}
    for slot in slots:
        value, stack = filled[slot.name], slot.stack
        if stack is None:
            stored[slot.name] = value.cpu().contiguous()
            continue
        if stack.name not in stored:  # a bucket has all experts of a stack
            stored[stack.name] = torch.empty(stack.shape, dtype=value.dtype)
        stored[stack.name][slot.expert, :, stack.columns] = value.t()
    return stored
