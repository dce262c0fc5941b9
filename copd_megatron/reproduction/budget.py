"""What an arm spends: steps, sampled tokens and core-seconds, read from its runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from copd_megatron.recipes.experiments.base import Task
from copd_megatron.report.history import RunHistory, read_run
from copd_megatron.reproduction.arms import INDEPENDENT
from copd_megatron.reproduction.runner import Cost


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Of one arm and seed, all that its model needed counted."""

    steps: int
    """Updates, over all branches."""
    tokens: float
    """Response tokens that were trained on, over all branches."""
    core_seconds: float


def budget_of(tasks: Sequence[Task], runs: Path, costs: Mapping[str, Cost]) -> Budget:
    """The sum over an arm's tasks.

    An expert that was taken from a checkpoint counts as far as that checkpoint, and the independent experts
    count once: as a whole if the arm uses them as they ended, or else by what was taken of them.
    """
    steps, tokens, seconds = 0, 0.0, 0.0
    whole = any(task.name == INDEPENDENT for task in tasks)
    for task in tasks:
        seconds += costs[task.name].core_seconds
        if task.trains:
            history = read_run(runs / task.name)
            names = [name for name, branch in task.config.branches.items() if not branch.frozen]
            for name in names:
                steps += len(history.steps)
                tokens += sampled_tokens(history, name)
        elif task.after == (INDEPENDENT,) and task.merge is not None and not whole:
            branch, _, age = task.name.removeprefix("expert_").rpartition("_")
            history = read_run(runs / INDEPENDENT)
            share = int(age) / len(history.steps) / sum(_trained(history, n) for n in _names(history))
            seconds += share * costs[INDEPENDENT].core_seconds
            steps += int(age)
            tokens += sampled_tokens(history, branch, last=int(age))
    return Budget(steps=steps, tokens=tokens, core_seconds=seconds)


def sampled_tokens(history: RunHistory, branch: str, last: int | None = None) -> float:
    """Response tokens of a branch's rows, native and cross, as far as step ``last``."""
    rows = history.series[f"{branch}/train/num_rows"]
    lengths = history.series[f"{branch}/train/response_length"]
    return math.fsum(
        count * length
        for step, count, length in zip(history.steps, rows, lengths, strict=True)
        if last is None or step <= last
    )


def _names(history: RunHistory) -> list[str]:
    return [
        name.removesuffix("/train/num_rows") for name in history.series if name.endswith("/train/num_rows")
    ]


def _trained(history: RunHistory, branch: str) -> bool:
    return any(not math.isnan(value) for value in history.series[f"{branch}/train/num_rows"])
