"""Floating-point operations of rows, and what a layer's micro-batches are. Pure.

matrices   2 N tokens           N weights that a token meets in the decoder's layers; shared prompts once
head       2 V h responses      only responses meet the vocabulary
attention  2 L q sum(length^2)  two products of [length, q], half of each masked; twice that on a CPU,
                                where nothing is left out
vision     2 W m^2 media        W weights of the tower, m^2 patches to a media token
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from copd_megatron.config.hardware import shares_prompts
from copd_megatron.config.schema import BranchConfig, Config
from copd_megatron.model.shape import ModelShape
from copd_megatron.planner.memory import MicroBatch
from copd_megatron.planner.workload import BranchWork, Rows


@dataclass(frozen=True, kw_only=True)
class RowSums:
    """Of several kinds of rows."""

    count: float
    tokens: float
    passed_tokens: float
    """That go through the actor's layers: with shared prompts, a group's prompt once."""
    response_tokens: float
    media_tokens: float
    """Of the passed ones, those of images and videos."""
    squares: float


def sums(rows: Iterable[Rows], *, share_prompts: bool = False, parts: int = 1) -> RowSums:
    """Counts over all rows.

    Args:
        share_prompts: a prompt is computed once for the rows of its group that are together.
        parts: at random, into which the rows are divided before (mini-batches).
    """
    kinds = list(rows)
    own = [r.prompts(parts) if share_prompts else r.count for r in kinds]
    return RowSums(
        count=math.fsum(r.count for r in kinds),
        tokens=math.fsum(r.tokens for r in kinds),
        passed_tokens=math.fsum(
            r.response_tokens + prompts * r.lengths.prompt.average
            for r, prompts in zip(kinds, own, strict=True)
        ),
        response_tokens=math.fsum(r.response_tokens for r in kinds),
        media_tokens=math.fsum(
            prompts * r.lengths.media_tokens for r, prompts in zip(kinds, own, strict=True)
        ),
        squares=math.fsum(r.squares for r in kinds),
    )


def forward_flops(shape: ModelShape, rows: RowSums, *, on_gpu: bool) -> float:
    """Of one forward pass over the rows, without the vision tower's."""
    query = shape.num_attention_heads * shape.head_dim
    decoder = 2 * shape.num_layers * shape.active_layer_parameters * rows.passed_tokens
    head = 2 * shape.embedding_parameters * rows.response_tokens
    attention = (2 if on_gpu else 4) * shape.num_layers * query * rows.squares
    return decoder + head + attention


def vision_flops(shape: ModelShape, rows: RowSums) -> float:
    """Of the vision tower, which every tensor-parallel rank of the first stage runs whole."""
    if shape.vision is None:
        return 0.0
    return 2 * shape.vision.num_parameters * shape.vision.spatial_merge_size**2 * rows.media_tokens


def micro_batches(config: Config, branch: BranchConfig, rows: RowSums) -> int:
    """Of one rank, in one pass over the rows."""
    if not rows.count:
        return 0
    parallel = branch.parallel
    budget = config.training.micro_batch_tokens * parallel.context_parallel_size
    ranks = parallel.data_parallel_size
    count = max(math.ceil(rows.passed_tokens / budget / ranks), 1)
    if parallel.virtual_pipeline_model_parallel_size > 1:
        count = -(-count // parallel.pipeline_model_parallel_size) * parallel.pipeline_model_parallel_size
    return count


def largest_micro_batch(
    config: Config, branch: BranchConfig, works: Sequence[BranchWork], *, on_gpu: bool
) -> MicroBatch | None:
    """The fullest micro-batch of the steps that these works describe, in one rank's tokens; None: no rows.

    Micro-batches are made equal, so that one is the rows' tokens over the number of micro-batches. Where a
    branch learns, those of its updates count: only they keep what the backward pass needs.
    """
    parts = config.training.num_mini_batches
    share = shares_prompts(config.training, branch.parallel, on_gpu=on_gpu)
    trained = [sums(work.trained, share_prompts=share, parts=parts) for work in works]
    others = [sums(rows, share_prompts=share) for work in works for rows in (work.scored, work.taught)]
    found = [_micro_batch(config, branch, rows, parts) for rows in trained if rows.count]
    found = found or [_micro_batch(config, branch, rows, 1) for rows in others if rows.count]
    return max(found, key=lambda batch: batch.tokens, default=None)


def _micro_batch(config: Config, branch: BranchConfig, rows: RowSums, num_mini_batches: int) -> MicroBatch:
    parallel = branch.parallel
    count = micro_batches(config, branch, rows) * parallel.data_parallel_size
    share = max(count, num_mini_batches) * parallel.context_parallel_size
    return MicroBatch(
        tokens=rows.passed_tokens / share,
        row_tokens=rows.squares / rows.tokens,
        response_tokens=rows.response_tokens / share,
    )


def bubble(branch: BranchConfig, num_micro_batches: int) -> float:
    """Idle time of a pipeline, as a share of its work: (p - 1) / (m v)."""
    parallel = branch.parallel
    stages = parallel.pipeline_model_parallel_size
    if stages == 1 or not num_micro_batches:
        return 0.0
    return (stages - 1) / (num_micro_batches * parallel.virtual_pipeline_model_parallel_size)
