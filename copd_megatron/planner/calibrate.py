"""A machine's shares and overheads from what runs took. Pure.

Every part of a step has figures of its own. They are moved, one after the other and by ever smaller factors,
until the squared logarithms of (planned / measured), summed over all observations, fall no further. A small
penalty on leaving the present figure keeps those in place that the observations say nothing about.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from copd_megatron.planner.machine import Machine, with_figures
from copd_megatron.planner.plan import Inputs, branch_plan, works_of
from copd_megatron.planner.workload import BranchWork

FIGURES: Final[Mapping[str, tuple[str, ...]]] = {
    "generation": ("decode_share", "prefill_share", "decode_seconds", "token_seconds"),
    "update": ("update_share", "layer_seconds", "row_layer_seconds"),
    "scoring": ("score_share",),
    "teaching": ("score_share",),
    "weight_sync": ("sync_seconds",),
    "other": ("step_seconds", "row_seconds"),
}
"""Part of a step to the figures that it determines, in the order in which they are found."""
_PENALTY: Final = 0.003
_LARGEST_SHARE: Final = 1.0


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What one branch's step took in a phase."""

    inputs: Inputs
    branch: str
    phase: str
    seconds: Mapping[str, float]
    """By part; parts that are not there are not known."""
    works: Mapping[str, BranchWork] | None = None
    """The branch's rows, once they are computed."""


def calibrated(machine: Machine, observations: Sequence[Observation]) -> Machine:
    """The machine with the figures that explain the observations best.

    Raises:
        ValueError: no observations.
    """
    if not observations:
        raise ValueError("nothing was measured: give a run with at least two steps")
    known = [replace(o, works=works_of(o.inputs, o.branch)) for o in observations]
    for parts, names in _groups().items():
        seen = [o for o in known if any(o.seconds.get(part, 0) > 0 for part in parts)]
        if seen:
            machine = _fitted(machine, seen, parts, names)
    return machine


def _groups() -> dict[tuple[str, ...], tuple[str, ...]]:
    """Parts that share their figures, together."""
    groups: dict[tuple[str, ...], tuple[str, ...]] = {}
    for names in dict.fromkeys(FIGURES.values()):
        groups[tuple(part for part, own in FIGURES.items() if own == names)] = names
    return groups


def _fitted(
    machine: Machine, seen: Sequence[Observation], parts: Sequence[str], names: Sequence[str]
) -> Machine:
    moving = [name for name in names if getattr(machine, name) > 0]
    start = {name: getattr(machine, name) for name in moving}

    def error(figures: Mapping[str, float]) -> float:
        tried = with_figures(machine, figures)
        total = _PENALTY * sum(math.log(figures[n] / start[n]) ** 2 for n in moving)
        return total + sum(_squares(tried, o, parts) for o in seen)

    best, least = dict(start), error(start)
    factor = 4.0
    while factor > 1.01:
        moved = False
        for name in moving:
            for step in (factor, 1 / factor):
                tried = {**best, name: best[name] * step}
                if name.endswith("_share") and machine.on_gpu and tried[name] > _LARGEST_SHARE:
                    continue
                if (value := error(tried)) < least:
                    best, least, moved = tried, value, True
        if not moved:
            factor = math.sqrt(factor)
    return with_figures(machine, best)


def _squares(machine: Machine, observation: Observation, parts: Sequence[str]) -> float:
    inputs = replace(observation.inputs, machine=machine)
    plan = branch_plan(inputs, observation.branch, observation.works)
    planned = plan.steps[observation.phase].seconds.parts()
    total = 0.0
    for part in parts:
        measured = observation.seconds.get(part, 0.0)
        if measured > 0 and planned[part] > 0:
            total += math.log(planned[part] / measured) ** 2
    return total
