"""Branches that teach each other: the configuration as it is, then an evaluation of what it made."""

from __future__ import annotations

from pathlib import Path

from copd_megatron.config import Config
from copd_megatron.recipes.experiments.base import Experiment, Task, export_of, run_of


def copd(config: Config, out: Path) -> list[Task]:
    """One run, and an evaluation of the merged model (of the only branch, if there is nothing to merge)."""
    run = run_of(config, out, "copd")
    trained = [name for name, branch in config.branches.items() if not branch.frozen]
    merged = run.end.merge and len(trained) > 1
    final = export_of(out, "copd", "merged" if merged else trained[0])
    return [
        Task(name="copd", config=run),
        Task(name="evaluate_copd", config=config, after=("copd",), evaluates=(final,)),
    ]


EXPERIMENT: Experiment = copd
