#!/usr/bin/env python3
"""What verification costs of a training step, from the figures and samples of finished runs.

    copd train configs/two_branch_tiny.yaml schedule.cycles=1 schedule.rlvr_steps=4
    python tools/bench_verification.py runs/two_branch_tiny

Prints a line for each branch, with means over the steps after the first, which starts the grading processes:
``waiting`` is the share of a step in which the ranks do nothing but wait for grades (``timing/grading``);
``verdicts`` is the share that all verdicts would take one after the other, each as long as those on the
samples that the run kept, which are graded again here. Most of that time passes beside sampling.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import _tree  # noqa: F401  (puts this tree on the path)

from copd_megatron.rewards.audit import audit
from copd_megatron.samples.audit import read_cases
from copd_megatron.samples.files import Selection


def means(run_dir: Path) -> dict[str, float]:
    """Every figure's mean over the steps after the first."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines][1:]
    names = {name for step in steps for name, value in step.items() if isinstance(value, int | float)}
    return {name: statistics.fmean(step.get(name) or 0.0 for step in steps) for name in names}


def describe(run_dir: Path, branch: str, figures: dict[str, float], limit: int) -> str:
    """One branch's line."""
    step = figures[f"{branch}/timing/step_seconds"]
    waiting = figures[f"{branch}/timing/grading_seconds"] / step
    graded = read_totals(run_dir, f"{branch}/rewards/graded")
    verdicts = audit(read_cases(run_dir, selection=Selection(branch=branch))[:limit]).verdicts
    seconds = statistics.fmean(verdict.seconds for verdict in verdicts)
    return (
        f"{run_dir.name}/{branch}: step_seconds={step:.2f} responses={graded:.0f} "
        f"ms_per_verdict={1000 * seconds:.2f} waiting={waiting:.2%} verdicts={graded * seconds / step:.2%}"
    )


def read_totals(run_dir: Path, name: str) -> float:
    """By how much a running total grows in a step."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    totals = [json.loads(line)[name] for line in lines]
    return (totals[-1] - totals[0]) / (len(totals) - 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="directories of runs of at least two steps")
    parser.add_argument("--limit", type=int, default=200, help="grade so many samples of a branch at most")
    arguments = parser.parse_args()
    for run_dir in arguments.runs:
        figures = means(run_dir)
        suffix = "/timing/step_seconds"
        for branch in sorted(name.removesuffix(suffix) for name in figures if name.endswith(suffix)):
            print(describe(run_dir, branch, figures, arguments.limit), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
