"""What an experiment is made of: tasks that wait for each other."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from copd_megatron.config import Config
from copd_megatron.plugins import EXPERIMENTS


@dataclass(frozen=True, kw_only=True)
class Task:
    """One job of an experiment."""

    name: str
    config: Config
    """Of a training; of an evaluation, the configuration whose validation sets are used."""
    after: tuple[str, ...] = ()
    """Names of the tasks it needs."""
    evaluates: tuple[str, ...] = ()
    """Model folders to evaluate; empty: it is a training."""


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
