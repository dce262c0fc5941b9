"""What an experiment is made of: tasks that wait for each other."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from copd_megatron.config import Config
from copd_megatron.config.schema import Topology
from copd_megatron.plugins import EXPERIMENTS


@dataclass(frozen=True, kw_only=True)
class Merge:
    """The uniform mean of models."""

    models: tuple[str, ...]
    """Model folders."""
    out: str
    """Folder for the result."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One job of an experiment: an evaluation, a merge, or else a training."""

    name: str
    config: Config
    """Of a training; of an evaluation, the configuration whose validation sets are used."""
    after: tuple[str, ...] = ()
    """Names of the tasks it needs."""
    evaluates: tuple[str, ...] = ()
    """Model folders to evaluate."""
    merge: Merge | None = None
    """Models to merge."""

    @property
    def trains(self) -> bool:
        """Whether it needs the ranks of its configuration; the others are one process."""
        return not self.evaluates and self.merge is None


Experiment = Callable[[Config, Path], list[Task]]
"""(configuration, folder below which every task has its run directory) to tasks, each after those it needs.

Raises ConfigError where the configuration lacks what the experiment needs."""


def tasks_of(config: Config, names: Sequence[str], out: Path) -> list[Task]:
    """The tasks of several experiments over one configuration.

    Args:
        config: as ``load_config`` returns it; it is not changed.
        names: files of this room, or ``package.module:EXPERIMENT``.
        out: folder below which every task has its run directory.

    Raises:
        ConfigError: an unknown name, or an experiment that the configuration does not suit.
    """
    tasks: list[Task] = []
    for name in names:
        experiment: Experiment = EXPERIMENTS.load(name, "--recipes")
        tasks += experiment(config, out)
    return tasks


def run_of(config: Config, out: Path, name: str) -> Config:
    """A copy of the configuration whose run is named ``name`` and writes to ``out / name``."""
    changed = copy.deepcopy(config)
    changed.run.name, changed.run.dir = name, str(out / name)
    return changed


def expert_of(config: Config, out: Path, branch: str, *, name: str, num_steps: int) -> Task:
    """One branch alone, by ``num_steps`` steps of reinforcement learning.

    Its weights will be in ``export_of(out, name, branch)``.
    """
    run = run_of(config, out, name)
    run.branches = {branch: run.branches[branch]}
    run.branches[branch].frozen = False
    learn_alone(run, num_steps)
    return Task(name=name, config=run)


def learn_alone(run: Config, num_steps: int) -> None:
    """Makes a run one of ``num_steps`` steps of reinforcement learning and no distillation."""
    run.schedule.cycles, run.schedule.rlvr_steps, run.schedule.opd_steps = 1, num_steps, 0
    run.opd.topology, run.opd.hub, run.opd.edges = Topology.none, None, []


def export_of(out: Path, task: str, branch: str) -> str:
    """Where a training task leaves the weights of a branch."""
    return str(out / task / "export" / branch)
