"""Expected seconds of a branch's step by part. Pure.

    generation   ``planner/sampling.py``
    grading      the last response's verdict; the others' overlap with sampling
    pass(n)      n (flops / (ranks peak share) + L/p (micro-batches layer + rows row_layer)) (1 + bubble)
                 + links
                 n = 1 forward, 3 with a backward pass, 4 with full recomputation too
    scoring      pass(1) over the branch's own rows;  teaching: pass(1) over those of its students
    update       pass(3 or 4), the optimizer's (16 + 2 b) bytes a weight, gradients and weights over ranks
    exchange     router bytes / link
    weight_sync  bytes over the links, and into vLLM's copy
    other        step_seconds + rows row_seconds

What two ranks hide from each other (overlapped reduction, asynchronous saves) counts as nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Final

from copd_megatron.config.hardware import shares_prompts
from copd_megatron.config.schema import BranchConfig, Config, FP8Recipe, Recompute, RolloutQuantization
from copd_megatron.model.shape import ModelShape
from copd_megatron.planner.compute import RowSums, bubble, forward_flops, micro_batches, sums, vision_flops
from copd_megatron.planner.links import Link, StepRows, links
from copd_megatron.planner.machine import Machine
from copd_megatron.planner.memory import MemoryEstimate, compute_bytes, rank_parameters
from copd_megatron.planner.sampling import engine_of, sampling_seconds
from copd_megatron.planner.workload import BranchWork

_BACKWARD: Final = 3
"""Forward and backward pass, in forward passes."""


@dataclass(frozen=True, kw_only=True)
class BranchSeconds:
    """One branch's step, without waiting for others."""

    generation: float = 0.0
    grading: float = 0.0
    scoring: float = 0.0
    teaching: float = 0.0
    exchange: float = 0.0
    update: float = 0.0
    weight_sync: float = 0.0
    other: float = 0.0

    @property
    def before(self) -> float:
        """Until its rows are ready to be sent to teachers."""
        return self.generation + self.grading + self.scoring

    @property
    def between(self) -> float:
        """As a teacher, and in the exchange."""
        return self.teaching + self.exchange

    @property
    def after(self) -> float:
        return self.update + self.weight_sync + self.other

    @property
    def total(self) -> float:
        return self.before + self.between + self.after

    def parts(self) -> dict[str, float]:
        """Seconds by part."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, kw_only=True)
class BranchStep:
    """A branch's step in one phase."""

    seconds: BranchSeconds
    links: tuple[Link, ...]
    rows: StepRows


def branch_step(
    config: Config,
    branch: BranchConfig,
    shape: ModelShape,
    work: BranchWork,
    machine: Machine,
    memory: MemoryEstimate,
) -> BranchStep:
    """Seconds and bytes of a branch's step.

    Args:
        memory: of a rank, for what vLLM's cache holds.
    """
    size = compute_bytes(config, on_gpu=machine.on_gpu)
    share = shares_prompts(config.training, branch.parallel, on_gpu=machine.on_gpu)
    rows = StepRows(
        sampled=sums(work.sampled),
        trained=sums(work.trained, share_prompts=share, parts=config.training.num_mini_batches),
        scored=sums(work.scored, share_prompts=share),
        taught=sums(work.taught, share_prompts=share),
        asked=sums(work.asked),
    )
    parameters = rank_parameters(shape, branch)
    found = links(config, branch, shape, rows, machine, parameters=parameters, size=size)
    by_purpose = {link.purpose: link.seconds(machine) for link in found}
    passes = _Passes(config, branch, shape, machine, rows, by_purpose)
    response = max(
        (r.lengths.prompt.average + r.lengths.response.average / 2 for r in work.sampled), default=1.0
    )
    engine = engine_of(
        branch,
        shape,
        bytes_per_number=size,
        kv_bytes=memory.kv_cache or memory.engine_weights,
        context=response,
    )
    engines = branch.parallel.world_size // branch.rollout.tensor_parallel_size
    fp8 = branch.rollout.quantization is RolloutQuantization.fp8
    samples = not branch.frozen and rows.sampled.count > 0
    generation = 0.0
    if samples:
        generation = sampling_seconds(work.sampled, engine, engines, machine, fp8=fp8) + by_purpose["rollout"]
    seconds = BranchSeconds(
        generation=generation,
        grading=machine.grade_seconds if samples else 0.0,
        scoring=passes.forward(rows.scored),
        teaching=passes.forward(rows.taught),
        exchange=by_purpose["router"],
        update=0.0 if branch.frozen else passes.update(parameters, memory, size),
        weight_sync=0.0 if branch.frozen else _sync(branch, shape, machine, by_purpose["weights"], size),
        other=machine.step_seconds + machine.row_seconds * (rows.trained.count + rows.taught.count),
    )  # fmt: skip
    return BranchStep(seconds=seconds, links=tuple(found), rows=rows)


def _sync(branch: BranchConfig, shape: ModelShape, machine: Machine, over_links: float, size: int) -> float:
    """Weights out of the actor, over links, and into vLLM."""
    moved = 2 * size * shape.num_parameters / branch.rollout.tensor_parallel_size
    return machine.sync_seconds + over_links + moved / machine.memory_bytes_per_second


@dataclass(frozen=True)
class _Passes:
    """Passes of the actor over rows."""

    config: Config
    branch: BranchConfig
    shape: ModelShape
    machine: Machine
    rows: StepRows
    by_purpose: Mapping[str, float]

    def forward(self, rows: RowSums) -> float:
        """One forward pass."""
        return self._pass(rows, 1, self.machine.score_share, micro_batches(self.config, self.branch, rows))

    def update(self, parameters: Sequence[int], memory: MemoryEstimate, size: int) -> float:
        """Forward and backward passes over the step's rows, and the optimizer's steps."""
        rows, machine, config = self.rows.trained, self.machine, self.config
        if not rows.count:
            return 0.0
        parts = config.training.num_mini_batches
        part = RowSums(**{f.name: getattr(rows, f.name) / parts for f in fields(RowSums)})
        batches = parts * micro_batches(config, self.branch, part)
        seconds = self._pass(rows, self._backward, machine.update_share, batches)
        copies = self.branch.parallel.data_parallel_size * self.branch.parallel.context_parallel_size
        state = (16 + 2 * size) * sum(parameters) / copies + 8 * sum(parameters)
        once = state / machine.memory_bytes_per_second + self.by_purpose["data"]
        moved = 2 * memory.given_to_rollout / (machine.host_gb * 1e9 * machine.link_share)
        return seconds + parts * once + moved

    @property
    def _backward(self) -> int:
        return _BACKWARD + (self.config.training.recompute is Recompute.full)

    def _pass(self, rows: RowSums, factor: int, share: float, batches: int) -> float:
        if not rows.count:
            return 0.0
        parallel, machine = self.branch.parallel, self.machine
        fp8 = self.config.precision.fp8 is not FP8Recipe.none
        peak = machine.flops(share, fp8=fp8)
        text = forward_flops(self.shape, rows, on_gpu=machine.on_gpu) / parallel.world_size
        copies = parallel.data_parallel_size * parallel.context_parallel_size
        vision = vision_flops(self.shape, rows) / copies
        layers = self.shape.num_layers / parallel.pipeline_model_parallel_size
        overhead = layers * (
            batches * machine.layer_seconds
            + rows.count / parallel.data_parallel_size * machine.row_layer_seconds
            + self._latency(batches)
        )
        work = factor * ((text + vision) / peak + overhead)
        return work * (1 + bubble(self.branch, batches)) + self._over_links(rows, factor)

    def _latency(self, batches: int) -> float:
        """Of the collectives of one layer, over a rank's micro-batches."""
        parallel = self.branch.parallel
        count = 2 * (parallel.tensor_model_parallel_size > 1) + 2 * (parallel.expert_model_parallel_size > 1)
        return batches * count * self.machine.collective_seconds

    def _over_links(self, rows: RowSums, factor: int) -> float:
        """This pass's part of what tensor, expert, context and pipeline parallelism send in the step."""
        shared = ("tensor", "expert", "context", "pipeline")
        backward = 0 if self.branch.frozen else self._backward - 1
        weight = self.rows.scored.passed_tokens + self.rows.taught.passed_tokens
        weight += backward * self.rows.trained.passed_tokens
        mine = rows.passed_tokens * (1 if factor == 1 else backward)
        return sum(self.by_purpose[name] for name in shared) * mine / weight if weight else 0.0
