"""What an experiment is made of: tasks that wait for each other."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from copd_megatron.config import Config, ConfigError
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
        ConfigError: an unknown name, one that is given twice, or an experiment that the configuration does
            not suit.
    """
    tasks: list[Task] = []
    for name in names:
        experiment: Experiment = EXPERIMENTS.load(name, "--recipes")
        tasks += experiment(config, out)
    counts = Counter(task.name for task in tasks)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise ConfigError(
            f"--recipes {' '.join(names)}: makes two tasks of the name {twice[0]}, which would write to the "
            "same folder; name each recipe once"
        )
    for task in tasks:
        if task.trains:
            _check_exports(task, tasks)
    return tasks


def _check_exports(task: Task, tasks: Sequence[Task]) -> None:
    """Raises ConfigError if another task needs weights that a training would not write."""
    end, folder = task.config.end, Path(str(task.config.run.dir)) / "export"
    merges = end.merge and sum(not branch.frozen for branch in task.config.branches.values()) > 1
    if end.export or merges:  # a merge needs the exports and writes them in any case
        return
    for other in tasks:
        merged = () if other.merge is None else other.merge.models
        started = [branch.model_path for branch in other.config.branches.values() if branch.model_path]
        if any(Path(needed).is_relative_to(folder) for needed in (*other.evaluates, *merged, *started)):
            raise ConfigError(
                f"end.export: false, but task {other.name} reads what task {task.name} is to export; set "
                "end.export=true"
            )


def as_it_starts(task: Task, config: Config, tasks: Sequence[Task]) -> Config:
    """A task's configuration as it can be checked before any task has run: where a branch starts from what
    another task will export, the model that it was trained from stands in.

    Args:
        config: what the tasks were made from.
    """
    folders = [Path(str(other.config.run.dir)) / "export" for other in tasks if other.trains]
    checked = copy.deepcopy(task.config)
    for name, branch in checked.branches.items():
        made = branch.model_path and any(Path(branch.model_path).is_relative_to(f) for f in folders)
        if made:
            branch.model_path = config.branches[name].model_path if name in config.branches else None
    return checked


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
    evaluate_within(run)


def evaluate_within(run: Config) -> None:
    """Lets a run that was made shorter still be evaluated where it was to be evaluated on its way."""
    schedule = run.schedule
    steps = schedule.cycles * (schedule.rlvr_steps + schedule.opd_steps)
    run.evaluation.every_steps = min(run.evaluation.every_steps, steps)


def export_of(out: Path, task: str, branch: str) -> str:
    """Where a training task leaves the weights of a branch."""
    return str(out / task / "export" / branch)
