"""Experts that never meet, and their mean: what merging alone gives."""

from __future__ import annotations

from pathlib import Path

from copd_megatron.config import Config, ConfigError
from copd_megatron.recipes.experiments.base import Experiment, Merge, Task, expert_of, export_of


def experts_mean(config: Config, out: Path) -> list[Task]:
    """An expert for every branch by as many steps of reinforcement learning as both phases have together,
    then the uniform mean of the experts, and an evaluation of all.

    Raises:
        ConfigError: there is one branch only.
    """
    if len(config.branches) < 2:
        raise ConfigError("recipe experts_mean: a mean needs two branches or more, the configuration has one")
    schedule = config.schedule
    num_steps = schedule.cycles * (schedule.rlvr_steps + schedule.opd_steps)
    names = {branch: f"independent_{branch}" for branch in config.branches}
    experts = [
        expert_of(config, out, branch, name=name, num_steps=num_steps) for branch, name in names.items()
    ]
    exports = tuple(export_of(out, name, branch) for branch, name in names.items())
    merged = export_of(out, "experts_mean", "merged")
    return [
        *experts,
        Task(
            name="experts_mean",
            config=config,
            after=tuple(names.values()),
            merge=Merge(models=exports, out=merged),
        ),
        Task(
            name="evaluate_experts_mean",
            config=config,
            after=("experts_mean",),
            evaluates=(*exports, merged),
        ),
    ]


EXPERIMENT: Experiment = experts_mean
