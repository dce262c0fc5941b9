"""A run's plan beside what it took, and the planner's figures from a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from copd_megatron.config import Config, load_config, read_model_sizes
from copd_megatron.errors import ConfigError, DataError
from copd_megatron.planner.calibrate import Observation, calibrated
from copd_megatron.planner.lengths import Lengths
from copd_megatron.planner.machine import Machine, read_machine
from copd_megatron.planner.memory import GIB
from copd_megatron.planner.plan import PHASES, Inputs, make_plan
from copd_megatron.planner.workload import BranchLengths
from copd_megatron.report.history import RunHistory, read_run

PARTS = ("generation", "grading", "scoring", "teaching", "exchange", "update", "weight_sync", "other")
_MEMORY = ("sampling", "scoring", "update", "weight_sync")


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One planned figure and its measurement."""

    branch: str
    what: str
    planned: float
    measured: float
    unit: str

    @property
    def ratio(self) -> float:
        """Planned / measured."""
        return self.planned / self.measured


def calibrated_by_run(inputs: Inputs, run_dir: Path) -> Inputs:
    """The inputs with the machine's figures that a run's timings give; with one warm-up step left out.

    Raises:
        FileNotFoundError, DataError: the run directory holds no metrics of at least two steps.
        ConfigError: its settings or its model's sizes cannot be read.
    """
    run = read_run(run_dir)
    config = load_config(run_dir / "config.yaml")
    of_run = Inputs(
        config=config,
        shapes=read_model_sizes(config),
        lengths=lengths_of_run(config, run),
        machine=inputs.machine,
    )
    seen = [
        Observation(inputs=of_run, branch=name, phase=phase, seconds=seconds)
        for phase in PHASES
        for name in config.branches
        if (seconds := measured_parts(run, name, phase))
    ]
    if not seen:
        raise DataError(f"{run_dir}: no metrics of a second step, and the first one warms up")
    return replace(inputs, machine=calibrated(inputs.machine, seen))


def lengths_of_run(config: Config, run: RunHistory) -> dict[str, BranchLengths]:
    """What is known of a run's lengths: responses by their mean; prompts by what its settings allow."""
    found = {}
    for name, branch in config.branches.items():
        response = _mean(run.series.get(f"{name}/train/response_length", ())) or 1.0
        prompt = _mean(run.series.get(f"{name}/train/prompt_length", ())) or branch.data.max_prompt_tokens / 4
        limit = branch.rollout.max_new_tokens
        found[name] = BranchLengths(
            prompt=Lengths(mean=prompt, p99=prompt, limit=branch.data.max_prompt_tokens),
            response=Lengths(mean=response, p99=response, limit=limit),
        )
    return found


def measured_parts(run: RunHistory, branch: str, phase: str, *, clock: str = "timing/") -> dict[str, float]:
    """Seconds of a branch's step by part: medians over the steps of a phase, without the run's first step."""
    places = [
        i for i, (step, p) in enumerate(zip(run.steps, run.phases, strict=True)) if p == phase and step > 1
    ]
    found = {}
    for part in PARTS:
        series = run.series.get(f"{branch}/{clock}{part}_seconds")
        values = [] if series is None else [series[i] for i in places if not math.isnan(series[i])]
        if values:
            found[part] = sorted(values)[len(values) // 2]
    return found


def plan_beside_measured(run_dir: Path, run: RunHistory) -> list[Compared]:
    """The figures of a run's plan and its measurements, on the machine that the run had; empty where its
    settings or its model's sizes cannot be read here."""
    try:
        config = load_config(run_dir / "config.yaml")
        machine = _machine_of(config, run)
        inputs = Inputs(
            config=config,
            shapes=read_model_sizes(config),
            lengths=lengths_of_run(config, run),
            machine=machine,
        )
        plan = make_plan(inputs)
    except (ConfigError, OSError):
        return []
    rows = []
    for branch in plan.branches:
        for phase, step in branch.steps.items():
            measured = measured_parts(run, branch.name, phase)
            title = {"rlvr": "Phase I", "opd": "Phase II"}[phase]
            for part, planned in step.seconds.parts().items():
                if measured.get(part, 0.0) > 0.001:
                    what = f"{title}, {part.replace('_', ' ')}"
                    rows.append(
                        Compared(
                            branch=branch.name, what=what, planned=planned, measured=measured[part], unit="s"
                        )
                    )
        peak = measured_gib(run, branch.name, on_gpu=machine.on_gpu)
        if peak is not None:
            needed = branch.needed_bytes / GIB
            rows.append(
                Compared(
                    branch=branch.name, what="memory of a rank", planned=needed, measured=peak, unit="GiB"
                )
            )
    return rows


def _compared(branch: str, what: str, planned: float, measured: float, unit: str) -> Compared:
    return Compared(branch=branch, what=what, planned=planned, measured=measured, unit=unit)


def measured_gib(run: RunHistory, branch: str, *, on_gpu: bool) -> float | None:
    """The largest memory of a rank in any phase of any step, in GiB; None where it was not measured."""
    kinds = ("device", "peak") if on_gpu else ("peak", "resident")
    for kind in kinds:
        values = [
            value
            for phase in _MEMORY
            for value in run.series.get(f"{branch}/perf/memory_{phase}_{kind}_gib", ())
            if not math.isnan(value)
        ]
        if values:
            return max(values)
    return None


def _machine_of(config: Config, run: RunHistory) -> Machine:
    """``cpu`` where memory was measured as a process's, else ``h100``."""
    resident: Mapping[str, object] = {n: 0 for n in run.series if n.endswith("_resident_gib")}
    return read_machine("cpu" if resident or config.run.device.value == "cpu" else "h100")


def _mean(values: tuple[float, ...]) -> float | None:
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else None
