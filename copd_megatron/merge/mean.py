"""Weighted mean of Hugging Face folders, tensor by tensor: theta = sum_k w_k theta_k (paper section 3.2)."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from copd_megatron.policy.weights import HFFolder
from copd_megatron.weight_sync.export import copy_companions, shard_name, write_index


def merge_mean(
    folders: Sequence[str | Path],
    target: str | Path,
    *,
    weights: Sequence[float] | None = None,
    shard_bytes: int = 2 * 2**30,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = lambda: None,
) -> None:
    """Writes the mean of several models of one architecture; sums in float64, keeps the first's types.

    Args:
        folders: Hugging Face folders with the same tensors.
        target: written under a temporary name and renamed when complete; configuration and tokenizer come
            from the first folder.
        weights: one per folder; default 1/K each.
        rank, world_size, barrier: processes that share the work (each writes some of the shards), and how
            they wait for each other.

    Raises:
        ValueError: the folders differ in tensors or shapes, or there are not as many weights as folders.
    """
    sources = [HFFolder(folder) for folder in folders]
    factors = [1.0 / len(sources)] * len(sources) if weights is None else list(weights)
    if len(factors) != len(sources) or not sources:
        raise ValueError(f"merge: {len(factors)} weights for {len(sources)} models")
    for source in sources[1:]:
        if difference := sorted(set(source.names()) ^ set(sources[0].names())):
            raise ValueError(
                f"merge: {source.folder} and {sources[0].folder} do not hold the same tensors; "
                f"{len(difference)} differ, the first: {', '.join(difference[:5])}"
            )
    final = Path(target)
    partial = final.with_name(final.name + ".partial")
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        copy_companions(folders[0], partial)
    barrier()
    shards = _shards(sources[0], shard_bytes)
    where: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards, start=1):
        file = shard_name(number, len(shards))
        where |= dict.fromkeys(names, file)
        total += sum(sources[0].num_bytes(name) for name in names)
        if number % world_size == rank:
            save_file({n: _mean(sources, factors, n) for n in names}, partial / file, {"format": "pt"})
    barrier()
    if rank == 0:
        write_index(partial, where, total)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    barrier()


def _mean(sources: Sequence[HFFolder], factors: Sequence[float], name: str) -> torch.Tensor:
    first = sources[0].read(name)
    total = first.double() * factors[0]
    for source, factor in zip(sources[1:], factors[1:], strict=True):
        other = source.read(name)
        if other.shape != first.shape:
            raise ValueError(
                f"merge: {name} is {tuple(other.shape)} in {source.folder}, {tuple(first.shape)} in "
                f"{sources[0].folder}"
            )
        total += other.double() * factor
    return total.to(first.dtype)


def _shards(source: HFFolder, shard_bytes: int) -> list[list[str]]:
    """Tensor names cut into files of at most ``shard_bytes`` (or one larger tensor)."""
    shards: list[list[str]] = [[]]
    size = 0
    for name in source.names():
        num_bytes = source.num_bytes(name)
        if shards[-1] and size + num_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += num_bytes
    return shards
