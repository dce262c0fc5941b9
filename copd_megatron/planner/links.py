"""What a rank sends in a step, by purpose and link. Pure.

A ring of n ranks moves 2 (n - 1) / n of a tensor to all-reduce it, half of that to gather or scatter it. Per
rank and step, with ``b`` bytes per number, ``T`` tokens of the rank's share, ``h`` hidden size:

    tensor     8 L b T h (t - 1) / t       two all-reduces a layer forward, two backward (forward only: half)
    expert     4 L b T k h (e - 1) / e     dispatch and combine, forward and backward
    context    4 L b T 2 g (c - 1)         keys and values around the ring, forward and twice backward
    pipeline   2 b T h                     activations out, gradients back
    data       (4 + b) P (d c - 1) / (d c) gradients scattered, weights gathered
    weights    b W / rollout_tp            of the model, that a rank does not hold itself, into vLLM
    rollout    4 L b h tokens (r - 1) / r  of the engine's tokens; two all-reduces a layer of vLLM
    router     4 (tokens + answers)        rows out and log-probabilities back, ``planner/traffic.py``
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from copd_megatron.config.schema import BranchConfig, Config, Recompute
from copd_megatron.model.shape import ModelShape
from copd_megatron.planner.compute import RowSums
from copd_megatron.planner.machine import Machine
from copd_megatron.planner.traffic import LOGPROB_BYTES, TOKEN_ID_BYTES

PURPOSES = ("tensor", "expert", "context", "pipeline", "data", "weights", "rollout", "router")


@dataclass(frozen=True, kw_only=True)
class Link:
    """What one rank sends for one purpose in a step."""

    purpose: str
    num_bytes: float
    inside_node: bool

    def seconds(self, machine: Machine) -> float:
        """If nothing hides it."""
        return self.num_bytes / machine.link_bytes_per_second(inside_node=self.inside_node)


@dataclass(frozen=True, kw_only=True)
class StepRows:
    """Row sums of a branch's step."""

    sampled: RowSums
    trained: RowSums
    scored: RowSums
    taught: RowSums
    asked: RowSums


def links(
    config: Config,
    branch: BranchConfig,
    shape: ModelShape,
    rows: StepRows,
    machine: Machine,
    *,
    parameters: tuple[int, int],
    size: int,
) -> list[Link]:
    """What a rank of a branch sends in a step.

    Args:
        parameters: dense weights and experts' weights on the rank.
        size: bytes per number.
    """
    parallel, node = branch.parallel, machine.ranks_per_node
    t, p = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    c, d, e = (
        parallel.context_parallel_size,
        parallel.data_parallel_size,
        parallel.expert_model_parallel_size,
    )
    r, ranks = branch.rollout.tensor_parallel_size, parallel.world_size
    layers = shape.num_layers / p
    # forward passes and what the backward pass adds, in tokens of one rank's share
    backward = 3 if config.training.recompute is Recompute.full else 2
    forward_tokens = (rows.scored.passed_tokens + rows.taught.passed_tokens) / (d * c)
    trained_tokens = 0.0 if branch.frozen else rows.trained.passed_tokens / (d * c)
    passes = forward_tokens + trained_tokens * backward
    top = shape.num_experts_per_token
    kv = 2 * shape.num_query_groups * shape.head_dim / t
    found = {
        "tensor": (4 * layers * size * passes * shape.hidden_size * (t - 1) / t, t <= node),
        "expert": (2 * layers * size * passes * top * shape.hidden_size * (e - 1) / e / t, e <= node),
        "context": (2 * layers * size * passes * kv * (c - 1), t * c <= node),
        "pipeline": (2 * size * passes * shape.hidden_size / t * (p > 1), ranks <= node),
        "data": _data(branch, parameters, size, node),
        "weights": (_weights(branch, shape, size), ranks <= node),
        "rollout": (
            4 * shape.num_layers * size * shape.hidden_size * rows.sampled.tokens / ranks * (r - 1),
            r <= node,
        ),
        "router": (_router(rows) / ranks, False),
    }  # fmt: skip
    return [Link(purpose=name, num_bytes=found[name][0], inside_node=found[name][1]) for name in PURPOSES]


def _weights(branch: BranchConfig, shape: ModelShape, size: int) -> float:
    """Bytes of vLLM's copy that a rank's own part of the actor does not hold."""
    if branch.frozen:
        return 0.0
    held = 1 / branch.parallel.world_size
    return size * shape.num_parameters / branch.rollout.tensor_parallel_size * (1 - held)


def _data(branch: BranchConfig, parameters: tuple[int, int], size: int, node: int) -> tuple[float, bool]:
    """Bytes of gradients and weights over data-parallel ranks, and whether they stay in a node."""
    parallel = branch.parallel
    copies = parallel.data_parallel_size * parallel.context_parallel_size
    stage = parallel.tensor_model_parallel_size * copies
    expert_copies = max(stage // parallel.expert_model_parallel_size, 1)
    dense, experts = parameters
    if branch.frozen:
        return 0.0, True
    moved = dense * (copies - 1) / copies + experts * (expert_copies - 1) / expert_copies
    return (4 + size) * moved, stage <= node


def _router(rows: StepRows) -> float:
    """Bytes that cross between this branch and others, sent and received, over all of its ranks."""
    crossing = 0.0
    for part in (rows.asked, rows.taught):
        crossing += TOKEN_ID_BYTES * part.tokens + LOGPROB_BYTES * part.response_tokens
    return crossing


def link_seconds(found: list[Link], machine: Machine) -> Mapping[str, float]:
    """Seconds by purpose."""
    return {link.purpose: link.seconds(machine) for link in found}
