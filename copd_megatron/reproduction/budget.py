"""What an arm spends: steps, sampled tokens and core-seconds, read from its runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from copd_megatron.config.schema import BranchConfig
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
            for name, branch in task.config.branches.items():
                if not branch.frozen:
                    steps += len(history.steps)
                    tokens += trained_tokens(history, name, _native_rows(branch))
        elif task.after == (INDEPENDENT,) and task.merge is not None and not whole:
            branch_name, _, age = task.name.removeprefix("expert_").rpartition("_")
            history = read_run(runs / INDEPENDENT)
            share = int(age) / len(history.steps) / sum(_trained(history, n) for n in _names(history))
            seconds += share * costs[INDEPENDENT].core_seconds
            steps += int(age)
            rows = _native_rows(task.config.branches[branch_name])
            tokens += trained_tokens(history, branch_name, rows, last=int(age))
    return Budget(steps=steps, tokens=tokens, core_seconds=seconds)


def trained_tokens(history: RunHistory, branch: str, native_rows: int, last: int | None = None) -> float:
    """Response tokens of a branch's rows, native and cross, as far as step ``last``.

    Args:
        native_rows: of a step that has native rows; all others are cross, of all edges alike.
    """
    rows = history.series[f"{branch}/train/num_rows"]
    missing = (math.nan,) * len(rows)
    native = history.series.get(f"{branch}/train/response_length", missing)
    edges = history.named(f"{branch}/cross/", "/response_length").values()
    total = []
    for place, (step, count) in enumerate(zip(history.steps, rows, strict=True)):
        if (last is not None and step > last) or math.isnan(count):
            continue
        crossed = [edge[place] for edge in edges if not math.isnan(edge[place])]
        own = 0.0 if math.isnan(native[place]) else min(count, native_rows) if crossed else count
        total.append(own * native[place] if own else 0.0)
        total.append((count - own) * math.fsum(crossed) / len(crossed) if crossed else 0.0)
    return math.fsum(total)


def _native_rows(branch: BranchConfig) -> int:
    return branch.num_prompts_per_step * branch.num_generations_per_prompt


def _names(history: RunHistory) -> list[str]:
    return [
        name.removesuffix("/train/num_rows") for name in history.series if name.endswith("/train/num_rows")
    ]


def _trained(history: RunHistory, branch: str) -> bool:
    return any(not math.isnan(value) for value in history.series[f"{branch}/train/num_rows"])
