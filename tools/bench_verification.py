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
from collections.abc import Sequence
from pathlib import Path

import _tree  # noqa: F401  (puts this tree on the path)
from _numbers import count

from copd_megatron.rewards.audit import audit
from copd_megatron.samples.audit import read_cases
from copd_megatron.samples.files import Selection


def steps_of(run_dir: Path) -> list[dict[str, float]]:
    """The figures of every step."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def describe(
    run_dir: Path, branch: str, steps: Sequence[dict[str, float]], limit: int, trusted: Sequence[str]
) -> str:
    """One branch's line."""

    def mean(part: str) -> float:
        return statistics.fmean(step[f"{branch}/timing/{part}_seconds"] for step in steps[1:])

    graded = f"{branch}/rewards/graded"
    responses = (steps[-1][graded] - steps[0][graded]) / (len(steps) - 1)
    cases = read_cases(run_dir, selection=Selection(branch=branch)).cases[:limit]
    verdicts = audit(cases, trusted=trusted).verdicts
    seconds = statistics.median(verdict.seconds for verdict in verdicts)
    return (
        f"{run_dir.name}/{branch}: step_seconds={mean('step'):.2f} responses={responses:.0f} "
        f"ms_per_verdict={1000 * seconds:.2f} waiting={mean('grading') / mean('step'):.2%} "
        f"verdicts={responses * seconds / mean('step'):.2%}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="directories of runs of at least two steps")
    parser.add_argument("--limit", type=count, default=200, help="grade so many samples of a branch at most")
    parser.add_argument(
        "--allow-verifier", action="append", default=[], metavar="MODULE:FUNCTION",
        help="one of your own that the runs name; repeatable",
    )  # fmt: skip
    arguments = parser.parse_args()
    for run_dir in arguments.runs:
        steps = steps_of(run_dir)
        suffix = "/rewards/graded"
        for branch in sorted(name.removesuffix(suffix) for name in steps[-1] if name.endswith(suffix)):
            print(describe(run_dir, branch, steps, arguments.limit, arguments.allow_verifier), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
