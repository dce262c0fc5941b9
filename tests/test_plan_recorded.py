"""Plans against measured runs: figures that ``tools/bench_plan.py run`` recorded on a CPU."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from copd_megatron.planner.machine import Machine, read_machine
from copd_megatron.planner.recorded import Measured, compare, fitted, read_measured

RECORDED = Path(__file__).parent / "data/plan_runs.json"
SECONDS, MEMORY = math.log(1.25), math.log(1.10)


@pytest.fixture(scope="module")
def runs() -> list[Measured]:
    return read_measured(RECORDED, read_machine("cpu"))


@pytest.fixture(scope="module")
def machine(runs: list[Measured]) -> Machine:
    """Calibrated on the runs that are marked so."""
    return fitted(read_machine("cpu"), runs)


def test_figures_of_some_runs_predict_all(runs: list[Measured], machine: Machine) -> None:
    """Seconds within 25 %, memory within 10 %, of runs that calibrate and of runs that do not."""
    assert sum(run.calibrates for run in runs) >= 5 and any(not run.calibrates for run in runs)
    for run in runs:
        found = compare(run, machine)
        assert abs(math.log(found.seconds_ratio)) < SECONDS, found
        assert abs(math.log(found.gib_ratio)) < MEMORY, found


def test_the_shipped_cpu_is_the_calibrated_one(runs: list[Measured]) -> None:
    """``machines.yaml`` holds the figures that these runs give, so that plans for a CPU start from them."""
    for run in runs:
        found = compare(run, read_machine("cpu"))
        assert abs(math.log(found.seconds_ratio)) < math.log(1.3), found
        assert abs(math.log(found.gib_ratio)) < MEMORY, found


def test_a_run_that_took_twice_as_long_is_noticed(runs: list[Measured], machine: Machine) -> None:
    first = compare(runs[0], machine)
    assert abs(math.log(first.seconds_ratio * 2)) > SECONDS
