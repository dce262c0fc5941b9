"""Weighted mean of Hugging Face folders: theta = sum_k w_k theta_k (paper section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from copd_megatron.merge.engine import run_merge
from copd_megatron.merge.merger import SHARD_BYTES
from copd_megatron.merge.recipe import MergeRecipe, ModelInput


def merge_mean(
    folders: Sequence[str | Path],
    target: str | Path,
    *,
    weights: Sequence[float] | None = None,
    shard_bytes: int = SHARD_BYTES,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = lambda: None,
) -> None:
    """Writes the mean of several models of one architecture; sums in float64, keeps the first's types.

    Args:
        folders: Hugging Face folders with the same tensors.
        target: replaced if it exists; written under a temporary name and renamed when complete.
            Configuration and tokenizer come from the first folder.
        weights: one per folder, used without normalising them; default 1/K each.
        rank, world_size, barrier: processes that share the work (each writes some of the shards), and how
            they wait for each other.

    Raises:
        ValueError: the folders differ in tensors, shapes, architecture or tokenizer, or there are not as
            many weights as folders.
    """
    factors = [1.0 / len(folders) for _ in folders] if weights is None else list(weights)
    if len(factors) != len(folders) or not folders:
        raise ValueError(f"merge: {len(factors)} weights for {len(folders)} models")
    models = [
        ModelInput(path=str(folder), parameters={"weight": weight})
        for folder, weight in zip(folders, factors, strict=True)
    ]
    recipe = MergeRecipe(
        method="linear",
        models=tuple(models),
        parameters={"normalize": False},
        out_dtype="first",
        arithmetic="float64",
    )
    run_merge(
        recipe,
        target,
        shard_bytes=shard_bytes,
        overwrite=True,
        rank=rank,
        world_size=world_size,
        barrier=barrier,
    )
