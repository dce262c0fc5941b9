"""The phase schedule of Algorithm 1. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from copd_megatron.config.schema import Config, ScheduleConfig


class Phase(Enum):
    """Phase I: every branch learns from its own verifier. Phase II: they also distil into each other."""

    rlvr = "rlvr"
    opd = "opd"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One update of every branch."""

    index: int
    """0, 1, ... over the whole run."""
    cycle: int
    phase: Phase
    index_in_phase: int
    """0 at the phase's first step; teacher snapshots are taken there."""


def num_steps(config: ScheduleConfig) -> int:
    """Updates in the whole run."""
    return config.cycles * (config.rlvr_steps + config.opd_steps)


def probes_due(config: Config, step: Step) -> bool:
    """Whether it is measured in this step how alike the branches are."""
    options = config.opd.behaviour
    return bool(options.num_states) and step.index % options.every_steps == 0


def exchange_due(config: Config, step: Step) -> bool:
    """Whether anything crosses between branches in a step. Known to all of them beforehand."""
    return step.phase is Phase.opd or probes_due(config, step)


def asked_ahead(config: Config, step: Step) -> Step | None:
    """The next step, if its questions to teachers are asked in this one: with ``opd.max_teacher_lag``, within
    a phase. At the first step of a phase no question is open, so the branches meet there."""
    following = next(steps(config.schedule, step.index + 1), None)
    if not config.opd.max_teacher_lag or following is None or following.index_in_phase == 0:
        return None
    return following if exchange_due(config, following) else None


def in_step(config: Config, step: Step) -> bool:
    """Whether the branches end a step together, because something crosses between them in it."""
    return exchange_due(config, step) and not config.opd.max_teacher_lag


def steps(config: ScheduleConfig, start: int = 0) -> Iterator[Step]:
    """Steps ``start`` .. end: N cycles of S_RL Phase-I steps, then S_OPD Phase-II steps (Alg. 1)."""
    cycle_length = config.rlvr_steps + config.opd_steps
    for index in range(start, num_steps(config)):
        cycle, place = divmod(index, cycle_length)
        if place < config.rlvr_steps:
            yield Step(index=index, cycle=cycle, phase=Phase.rlvr, index_in_phase=place)
        else:
            yield Step(index=index, cycle=cycle, phase=Phase.opd, index_in_phase=place - config.rlvr_steps)
