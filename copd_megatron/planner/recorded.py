"""Measured runs, written by ``tools/bench_plan.py``, beside their plans."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from copd_megatron.config.load import load_config
from copd_megatron.config.schema import Config
from copd_megatron.model.shape import shape_from_record
from copd_megatron.planner.calibrate import Observation, calibrated
from copd_megatron.planner.lengths import Lengths
from copd_megatron.planner.machine import Machine
from copd_megatron.planner.memory import GIB
from copd_megatron.planner.plan import Inputs, branch_plan
from copd_megatron.planner.seconds import BranchSeconds
from copd_megatron.planner.workload import BranchLengths

PARTS = tuple(BranchSeconds().parts())
_CLOCK = "timing/processor/"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One run: what it was, and what its slowest rank took."""

    name: str
    calibrates: bool
    inputs: Inputs
    parts: Mapping[tuple[str, str], Mapping[str, float]]
    """(branch, phase) to seconds by part, each of the fastest step that does not warm up."""
    gib: Mapping[str, float]
    """Branch to the largest memory of a rank in any step."""

    def observations(self) -> list[Observation]:
        """For ``calibrated``."""
        return [
            Observation(inputs=self.inputs, branch=branch, phase=phase, seconds=parts)
            for (branch, phase), parts in self.parts.items()
        ]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A run's plan and its figures, of the branch and phase that takes longest."""

    name: str
    calibrates: bool
    planned_seconds: float
    measured_seconds: float
    planned_gib: float
    measured_gib: float

    @property
    def seconds_ratio(self) -> float:
        return self.planned_seconds / self.measured_seconds

    @property
    def gib_ratio(self) -> float:
        return self.planned_gib / self.measured_gib


def read_measured(path: Path, machine: Machine) -> list[Measured]:
    """The runs of a file.

    Raises:
        OSError, ValueError: it cannot be read.
    """
    return [_measured(record, machine) for record in json.loads(path.read_text(encoding="utf-8"))]


def fitted(machine: Machine, runs: Sequence[Measured]) -> Machine:
    """The machine with the figures that the runs marked so give, and with what their processes take before
    they hold a model: the mean of (measured - planned) memory."""
    chosen = [run for run in runs if run.calibrates]
    machine = calibrated(machine, [o for run in chosen for o in run.observations()])
    empty = replace(machine, process_gib=0.0)
    rest = []
    for run in chosen:
        for branch, gib in run.gib.items():
            planned = branch_plan(replace(run.inputs, machine=empty), branch).needed_bytes / GIB
            rest.append(gib - planned)
    return replace(machine, process_gib=round(max(sum(rest) / len(rest), 0.0), 3))


def compare(run: Measured, machine: Machine) -> Comparison:
    """A run beside its plan on a machine."""
    inputs = replace(run.inputs, machine=machine)
    plans = {branch: branch_plan(inputs, branch) for branch in run.inputs.config.branches}
    slowest = max(run.parts, key=lambda place: sum(run.parts[place].values()))
    planned = plans[slowest[0]].steps[slowest[1]].seconds.parts()
    fullest = max(run.gib, key=lambda branch: run.gib[branch])
    return Comparison(
        name=run.name,
        calibrates=run.calibrates,
        planned_seconds=sum(planned.values()),
        measured_seconds=sum(run.parts[slowest].values()),
        planned_gib=plans[fullest].needed_bytes / GIB,
        measured_gib=run.gib[fullest],
    )


def _measured(record: Mapping[str, Any], machine: Machine) -> Measured:
    config = _config(record["config"])
    shape = shape_from_record(record["model"])
    steps = record["steps"]
    lengths = {
        name: _lengths(config, name, float(record["prompt_tokens"]), record.get("media_tokens", 0.0), steps)
        for name in config.branches
    }
    inputs = Inputs(
        config=config, shapes=dict.fromkeys(config.branches, shape), lengths=lengths, machine=machine
    )
    parts = {}
    for name in config.branches:
        for phase in dict.fromkeys(step["phase"] for step in steps):
            warm = [step for step in steps if step["phase"] == phase and step["step"] > 1]
            if warm:
                parts[name, phase] = _parts(name, warm)
    gib = {name: max(_peaks(name, step) for step in steps) for name in config.branches}
    return Measured(name=record["name"], calibrates=record["calibrates"], inputs=inputs, parts=parts, gib=gib)


def _parts(branch: str, steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """By part; of each the fastest step's."""
    return {part: min(step.get(f"{branch}/{_CLOCK}{part}_seconds", 0.0) for step in steps) for part in PARTS}


def _peaks(branch: str, step: Mapping[str, float]) -> float:
    return max(
        value for key, value in step.items() if key.startswith(f"{branch}/perf/memory_") and "_peak_" in key
    )


def _lengths(
    config: Config, branch: str, prompt: float, media: float, steps: Sequence[Mapping[str, float]]
) -> BranchLengths:
    limit = config.branches[branch].rollout.max_new_tokens
    key = f"{branch}/train/response_length"
    response = sum(step.get(key, limit) for step in steps) / len(steps)
    return BranchLengths(
        prompt=Lengths(mean=prompt, p99=prompt, limit=prompt),
        response=Lengths(mean=response, p99=response, limit=limit),
        media_tokens=media,
    )


def _config(settings: Mapping[str, Any]) -> Config:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(yaml.safe_dump(dict(settings)), encoding="utf-8")
        return load_config(path)
