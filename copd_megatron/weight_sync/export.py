"""A live actor to a Hugging Face folder that transformers and vLLM load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from copd_megatron.model.slots import Slot
from copd_megatron.policy.actor import MegatronActor
from copd_megatron.weight_sync.stream import ShardStream

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 2 * 2**30


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
    partial = target.with_name(target.name + ".partial")
    stream = ShardStream(actor, rollout_tp=1, bucket_bytes=shard_bytes, destinations=(0,))
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        copy_companions(source, partial)
    where: dict[str, str] = {}
    total = 0
    for number, (bucket, filled) in enumerate(zip(stream.buckets, stream.buckets_filled(), strict=True), 1):
        if not first:
            continue
        file = shard_name(number, len(stream.buckets))
        tensors = as_stored(bucket.slots, filled)
        save_file(tensors, partial / file, {"format": "pt"})
        where |= dict.fromkeys(tensors, file)
        total += sum(t.numel() * t.element_size() for t in tensors.values())
    if first:
        write_index(partial, where, total)
        set_dtype(partial, str(stream.dtype).removeprefix("torch."))
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
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


def shard_name(number: int, count: int) -> str:
    """Hugging Face's file name of shard ``number`` (from 1)."""
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def write_index(folder: Path, where: dict[str, str], total_bytes: int) -> None:
    """The index over several shards; a single file needs none."""
    if len(set(where.values())) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(where.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def set_dtype(folder: Path, dtype: str) -> None:
    """Says in config.json which type the weights now have."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["dtype"] = dtype
    config.pop("torch_dtype", None)
    path.write_text(json.dumps(config, indent=2) + "\n")


def copy_companions(source: str | Path, target: Path) -> None:
    """Everything of a Hugging Face folder but the weights: configuration, tokenizer, processor, template."""
    for file in sorted(Path(source).iterdir()):
        if file.is_file() and file.suffix in {".json", ".txt", ".jinja", ".model"} and file.name != INDEX:
            shutil.copyfile(file, target / file.name)
