"""The plan of a run: what fits, how long a step takes, what the schedule costs. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from copd_megatron.config.graph import build_graph
from copd_megatron.config.schema import Config
from copd_megatron.config.validate import validate
from copd_megatron.errors import ConfigError
from copd_megatron.model.shape import ModelShape
from copd_megatron.planner.compute import largest_micro_batch
from copd_megatron.planner.machine import Machine
from copd_megatron.planner.memory import GIB, MemoryEstimate, estimate_memory
from copd_megatron.planner.seconds import BranchSeconds, BranchStep, branch_step
from copd_megatron.planner.workload import BranchLengths, BranchWork, branch_work

PHASES = ("rlvr", "opd")
_REFUSED = ("weights", "gradients", "optimizer", "activations", "logits", "media")
"""Parts of memory that a refusal may name."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a plan is made from, besides the layout."""

    config: Config
    shapes: Mapping[str, ModelShape]
    lengths: Mapping[str, BranchLengths]
    machine: Machine


@dataclass(frozen=True, kw_only=True)
class BranchPlan:
    """One branch: memory of a rank, and its step in each phase."""

    name: str
    ranks: int
    memory: MemoryEstimate
    needed_bytes: int
    """Of a rank's device: the larger turn, and the process itself."""
    refusal: str | None
    """Why it does not fit; None: it does."""
    steps: Mapping[str, BranchStep]


@dataclass(frozen=True, kw_only=True)
class PhasePlan:
    """A step of one phase, over all branches."""

    num_steps: int
    step_seconds: float
    waiting: Mapping[str, float]
    """Seconds that a branch waits for slower ones."""
    sampled_tokens: float
    router_bytes: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A whole run."""

    machine: str
    branches: tuple[BranchPlan, ...]
    phases: Mapping[str, PhasePlan]
    problems: tuple[str, ...]
    """Why it cannot run; empty: it can."""

    @property
    def ranks(self) -> int:
        return sum(branch.ranks for branch in self.branches)

    @property
    def seconds(self) -> float:
        """Of all steps, without start, evaluation and checkpoints."""
        return math.fsum(p.num_steps * p.step_seconds for p in self.phases.values())

    @property
    def gpu_hours(self) -> float:
        return self.seconds * self.ranks / 3600

    @property
    def sampled_tokens(self) -> float:
        """Response tokens of the whole schedule."""
        return math.fsum(p.num_steps * p.sampled_tokens for p in self.phases.values())


def make_plan(inputs: Inputs) -> Plan:
    """The plan of the layout that the configuration has.

    Raises:
        ConfigError: it has no branches.
    """
    config = inputs.config
    if not config.branches:
        raise ConfigError("branches: empty; name at least one branch, with its data")
    branches = tuple(branch_plan(inputs, name) for name in config.branches)
    phases = {}
    for phase, count in _steps(config).items():
        if count:
            phases[phase] = _phase(inputs, branches, phase, count)
    return Plan(
        machine=inputs.machine.name,
        branches=branches,
        phases=phases,
        problems=(*_invalid(inputs), *(b.refusal for b in branches if b.refusal is not None)),
    )


def _steps(config: Config) -> dict[str, int]:
    schedule = config.schedule
    return {"rlvr": schedule.cycles * schedule.rlvr_steps, "opd": schedule.cycles * schedule.opd_steps}


def _invalid(inputs: Inputs) -> tuple[str, ...]:
    """What the trainer would refuse."""
    try:
        validate(inputs.config, None, inputs.shapes)
    except ConfigError as error:
        return (str(error),)
    return ()


def works_of(inputs: Inputs, name: str) -> dict[str, BranchWork]:
    """A branch's rows in a step of each phase that there is."""
    graph = build_graph(inputs.config)
    return {
        phase: branch_work(inputs.config, graph, name, inputs.lengths, opd=phase == "opd")
        for phase, count in _steps(inputs.config).items()
        if count
    }


def branch_plan(
    inputs: Inputs, name: str, works: Mapping[str, BranchWork] | None = None, *, even_if_refused: bool = True
) -> BranchPlan:
    """One branch at the layout that the configuration gives it; other branches' layouts do not matter.

    Args:
        works: as ``works_of``; they do not depend on the layout.
        even_if_refused: compute seconds although it does not fit.
    """
    config, machine, shape = inputs.config, inputs.machine, inputs.shapes[name]
    branch, works = config.branches[name], works or works_of(inputs, name)
    room = int(machine.memory_gib * GIB)
    batch = (
        None if machine.on_gpu else largest_micro_batch(config, branch, list(works.values()), on_gpu=False)
    )
    memory = estimate_memory(config, branch, shape, on_gpu=machine.on_gpu, gpu_bytes=room, batch=batch)
    needed = memory.total + int(machine.process_gib * GIB)
    refusal = _refusal(inputs, name, memory, needed, room)
    steps = {}
    if refusal is None or even_if_refused:
        steps = {
            phase: branch_step(config, branch, shape, work, machine, memory) for phase, work in works.items()
        }
    return BranchPlan(
        name=name,
        ranks=branch.parallel.world_size,
        memory=memory,
        needed_bytes=needed,
        refusal=refusal,
        steps=steps,
    )


def _refusal(inputs: Inputs, name: str, memory: MemoryEstimate, needed: int, room: int) -> str | None:
    """Why a branch's ranks do not fit their memory."""
    config, shape, branch = inputs.config, inputs.shapes[name], inputs.config.branches[name]
    if needed > room:
        training = memory.training >= memory.sampling
        parts = {name: getattr(memory, name) for name in _REFUSED if training or name in ("weights", "media")}
        if not (training and memory.rollout_sleeps):
            parts |= {"vLLM's weights and cache": memory.rollout}
        largest = sorted(parts, key=lambda part: -parts[part])[:2]
        named = " and ".join(f"{part} {parts[part] / GIB:.1f} GiB" for part in largest)
        return (
            f"branches.{name}: {needed / GIB:.1f} GiB on a rank that has {room / GIB:.1f}: above all {named}"
        )
    if not inputs.machine.on_gpu or branch.frozen:
        return None
    groups = max(shape.num_query_groups // branch.rollout.tensor_parallel_size, 1)
    per_token = 2 * groups * shape.head_dim * shape.num_layers * 2
    if memory.kv_cache < per_token * config.model.max_sequence_tokens:
        return (
            f"branches.{name}: vLLM's weights ({memory.engine_weights / GIB:.1f} GiB) leave "
            f"{memory.kv_cache / GIB:.1f} GiB of its share "
            f"({branch.rollout.gpu_memory_utilization:.0%}) for a sequence's keys and values, which take "
            f"{per_token * config.model.max_sequence_tokens / GIB:.1f} GiB: raise "
            "rollout.tensor_parallel_size or rollout.gpu_memory_utilization"
        )
    return None


def _phase(inputs: Inputs, branches: tuple[BranchPlan, ...], phase: str, count: int) -> PhasePlan:
    seconds = {b.name: b.steps[phase].seconds for b in branches}
    step = step_seconds(list(seconds.values()), exchanges=exchanges(inputs.config, phase))
    return PhasePlan(
        num_steps=count,
        step_seconds=step,
        waiting={name: step - own.total for name, own in seconds.items()},
        sampled_tokens=math.fsum(b.steps[phase].rows.sampled.response_tokens for b in branches),
        router_bytes=math.fsum(
            link.num_bytes * b.ranks
            for b in branches
            for link in b.steps[phase].links
            if link.purpose == "router"
        )
        / 2,
    )


def exchanges(config: Config, phase: str) -> bool:
    """Whether branches wait for each other within a step of this phase, and not only at its end.

    With ``opd.max_teacher_lag`` they hardly do: what a teacher is asked was sent a step ago, so that a step
    takes what the slowest branch needs. The first step of a phase still waits, and counts like the others.
    """
    graph = build_graph(config)
    if not graph.edges or config.opd.max_teacher_lag:
        return False
    return phase == "opd" or config.opd.behaviour.num_states > 0


def step_seconds(branches: list[BranchSeconds], *, exchanges: bool) -> float:
    """A step ends when the slowest branch has ended it. Where rows go to teachers, all wait for the slowest
    sampler, then for the busiest teacher."""
    if not exchanges:
        return max(b.total for b in branches)
    return max(b.before for b in branches) + max(b.between for b in branches) + max(b.after for b in branches)
