"""The same steps one after the other: experts by reinforcement learning, then distillation from them."""

from __future__ import annotations

from pathlib import Path

from copd_megatron.config import Config, ConfigError
from copd_megatron.config.schema import Topology
from copd_megatron.recipes.experiments.base import (
    Experiment,
    Task,
    evaluate_within,
    expert_of,
    export_of,
    run_of,
)


def opd(config: Config, out: Path) -> list[Task]:
    """An expert for every branch by the steps of Phase I, then the first branch's expert learns from the
    others', frozen, by the steps of Phase II; all of each at once.

    Raises:
        ConfigError: there is one branch only.
    """
    if len(config.branches) < 2:
        raise ConfigError("recipe opd: distillation needs two branches or more, the configuration has one")
    num_steps = config.schedule.cycles * config.schedule.rlvr_steps
    experts = [
        expert_of(config, out, name, name=f"expert_{name}", num_steps=num_steps) for name in config.branches
    ]
    student = next(iter(config.branches))
    exports = [export_of(out, f"expert_{name}", name) for name in config.branches]
    return [
        *experts,
        Task(
            name="opd",
            config=_distillation(config, out, student),
            after=tuple(task.name for task in experts),
        ),
        Task(
            name="evaluate_opd",
            config=config,
            after=("opd",),
            evaluates=(*exports, export_of(out, "opd", student)),
        ),
    ]


def _distillation(config: Config, out: Path, student: str) -> Config:
    """The student's expert learns from all others."""
    run = run_of(config, out, "opd")
    run.schedule.opd_steps = config.schedule.cycles * config.schedule.opd_steps
    run.schedule.cycles, run.schedule.rlvr_steps = 1, 0
    evaluate_within(run)
    run.opd.topology, run.opd.hub, run.opd.edges = Topology.hub_and_spoke, student, []
    run.end.merge = False
    for name, branch in run.branches.items():
        branch.model_path = export_of(out, f"expert_{name}", name)
        branch.frozen = name != student
    return run


EXPERIMENT: Experiment = opd
