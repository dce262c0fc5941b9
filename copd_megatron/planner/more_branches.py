"""What one more branch costs. Pure."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

from copd_megatron.config.graph import build_graph
from copd_megatron.config.schema import EdgeConfig, Topology
from copd_megatron.planner.plan import Inputs, Plan, make_plan


@dataclass(frozen=True, kw_only=True)
class OneMore:
    """The differences that a copy of a branch makes."""

    copied: str
    ranks: int
    edges: int
    step_seconds: dict[str, float]
    """Of a step, by phase."""
    router_bytes: dict[str, float]
    """In a step, by phase."""
    gpu_hours: float


def one_more_branch(inputs: Inputs, plan: Plan) -> OneMore | None:
    """What changes if the last trained branch is there twice; None where there is none."""
    trained = [name for name, branch in inputs.config.branches.items() if not branch.frozen]
    if not trained:
        return None
    grown = with_copy(inputs, trained[-1])
    larger = make_plan(grown)
    return OneMore(
        copied=trained[-1],
        ranks=larger.ranks - plan.ranks,
        edges=len(build_graph(grown.config).edges) - len(build_graph(inputs.config).edges),
        step_seconds={
            phase: larger.phases[phase].step_seconds - part.step_seconds
            for phase, part in plan.phases.items()
        },
        router_bytes={
            phase: larger.phases[phase].router_bytes - part.router_bytes
            for phase, part in plan.phases.items()
        },
        gpu_hours=larger.gpu_hours - plan.gpu_hours,
    )


def with_copy(inputs: Inputs, name: str) -> Inputs:
    """The run with a copy of one branch, ``<name>_copy``, which has the same edges under ``custom``."""
    config = copy.deepcopy(inputs.config)
    copied = f"{name}_copy"
    config.branches[copied] = copy.deepcopy(config.branches[name])
    if config.opd.topology is Topology.custom:
        config.opd.edges += [
            _renamed(edge, name, copied) for edge in config.opd.edges if name in (edge.student, edge.teacher)
        ]
    return replace(
        inputs,
        config=config,
        shapes={**inputs.shapes, copied: inputs.shapes[name]},
        lengths={**inputs.lengths, copied: inputs.lengths[name]},
    )


def _renamed(edge: EdgeConfig, old: str, new: str) -> EdgeConfig:
    def other(name: str) -> str:
        return new if name == old else name

    prompts = None if edge.prompts is None else other(edge.prompts)
    return replace(edge, student=other(edge.student), teacher=other(edge.teacher), prompts=prompts)
