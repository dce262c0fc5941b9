#!/usr/bin/env python3
"""What the checks cost in the steps of a real training: CRCs, ranges, JSON, logs, agreement of ranks.

    python tools/bench_checks.py configs/two_branch_tiny.yaml schedule.cycles=2
    python tools/bench_checks.py my.yaml --limit 1 --json

Trains the configuration as ``copd train`` does, in a folder of its own that is removed afterwards, with a
clock around every function that only checks or makes harmless. Printed is each check's share of a step, over
all steps and ranks: the median, the smallest and the largest. Processor time is compared with processor time,
so that a busy machine changes little; the clocks themselves are counted with the checks. Where one check
calls another, the time is the outer one's. The first step of each rank, which imports and compiles, is left
out.

Exits with 1 if any check takes more than ``--limit`` percent of the median step.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from _numbers import amount

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

RESULTS = "COPD_BENCH_CHECKS"
"""Variable with the folder where each rank leaves its times."""
STAGE = "COPD_BENCH_LAUNCH"

CHECKS: dict[str, tuple[str, ...]] = {
    "wire: CRC": ("opd.wire:zlib.crc32", "opd.wire:ids_crc", "opd.wire:check_payload"),
    "wire: counts and ranges": (
        *("opd.wire:check_request", "opd.wire:check_scores", "opd.wire:check_ids"),
        "opd.wire:Header.unpack",
    ),
    "rollouts between ranks": ("rollout.packed:_check",),
    "messages between ranks": ("topology.messages:decode",),
    "rows of the loss": ("objectives.policy_loss:_check_inputs", "objectives.rows:check_same_length"),
    "samples of shards": ("data.samples:load_json", "data.samples:sample_from_record"),
    "media sizes": ("data.decode.limits:check_pixels",),
    "JSON reader": ("untrusted.json_text:load", "untrusted.json_text:made"),
    "files opened": ("untrusted.regular_file:open_regular",),
    "logs and screen": ("untrusted.visible:visible", "untrusted.visible:visible_json"),
    "letters of answers": ("untrusted.unicode_text:nfkc",),
    "verifiers: ids and answers": ("rewards.isolation:_task", "rewards.isolation:_read"),
    "verifiers: workers alive": ("rewards.processes:Worker.is_quiet",),
    "ranks: operations": ("topology.watch:Watch._enter", "topology.watch:Watch._leave"),
    "ranks: heartbeats, end of job": ("topology.rank_table:write_beat", "topology.job_end:Verdict.read"),
    "metrics: even over ranks": ("metrics.reduction:Metrics._check_even",),
}
"""Kind of check to the functions that do it, below ``copd_megatron``."""


class Clocks:
    """Processor seconds and calls by kind of check, of all threads of this process."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(CHECKS, 0.0)
        self.calls = dict.fromkeys(CHECKS, 0)
        self._inside = threading.local()

    def around(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function with a clock around it, unless it is called by another check."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.calls[kind] += 1
            if getattr(self._inside, "check", False):
                return function(*args, **kwargs)
            self._inside.check = True
            begin = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[kind] += time.thread_time() - begin
                self._inside.check = False

        return timed


def install(clocks: Clocks) -> None:
    """Puts the clocks around all checks, wherever they have been imported to."""
    for kind, names in CHECKS.items():
        for name in names:
            module_name, _, path = name.partition(":")
            owner: Any = import_module(f"copd_megatron.{module_name}")
            *holders, attribute = path.split(".")
            if holders == ["zlib"]:  # a module: ours sees its own copy of it
                owner.zlib = SimpleNamespace(crc32=clocks.around(kind, owner.zlib.crc32))
                continue
            for holder in holders:
                owner = getattr(owner, holder)
            before = vars(owner)[attribute]
            if isinstance(before, classmethod):
                setattr(owner, attribute, classmethod(clocks.around(kind, before.__func__)))
            elif isinstance(before, property):
                assert before.fget is not None
                setattr(owner, attribute, property(clocks.around(kind, before.fget)))
            elif holders:
                setattr(owner, attribute, clocks.around(kind, before))
            else:
                replace_everywhere(before, clocks.around(kind, before))


def replace_everywhere(function: Callable[..., Any], by: Callable[..., Any]) -> None:
    """In every module of the package that has imported it."""
    for name, module in list(sys.modules.items()):
        if name.startswith("copd_megatron"):
            for attribute, value in list(vars(module).items()):
                if value is function:
                    setattr(module, attribute, by)


def be_a_rank(folder: Path, arguments: list[str]) -> int:
    """``copd train`` with the clocks; leaves what every step took in ``folder``."""
    from copd_megatron.branch.observer import Observer
    from copd_megatron.cli.main import main as copd

    import_module("copd_megatron.train")
    clocks, steps = Clocks(), list[dict[str, Any]]()
    install(clocks)
    begin, end = Observer.begin, Observer.step
    state: dict[str, Any] = {}

    def begins(self: Observer, step: Any) -> None:
        begin(self, step)
        state.update(cpu=time.process_time(), wall=time.monotonic())
        state.update(seconds=dict(clocks.seconds), calls=dict(clocks.calls))

    def ends(self: Observer, step: Any, *, alone: bool = False) -> None:
        end(self, step, alone=alone)
        steps.append(
            {
                "cpu": time.process_time() - state["cpu"],
                "wall": time.monotonic() - state["wall"],
                "seconds": {kind: clocks.seconds[kind] - state["seconds"][kind] for kind in CHECKS},
                "calls": {kind: clocks.calls[kind] - state["calls"][kind] for kind in CHECKS},
            }
        )

    Observer.begin, Observer.step = begins, ends  # type: ignore[method-assign]
    status = copd(arguments)
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(steps))
    return status


def shares(steps: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Percent of each step's processor time, by kind of check, and of all checks together."""
    found = {kind: [100 * step["seconds"][kind] / step["cpu"] for step in steps] for kind in CHECKS}
    found["all checks"] = [100 * sum(step["seconds"].values()) / step["cpu"] for step in steps]
    return found


def table(steps: list[dict[str, Any]], found: Mapping[str, list[float]]) -> str:
    """The figures for people."""
    cpu, wall = ([step[name] for step in steps] for name in ("cpu", "wall"))
    lines = [
        f"{len(steps)} steps of all ranks; a step takes {statistics.median(cpu):.3f} s of processor "
        f"({min(cpu):.3f} to {max(cpu):.3f}) and {statistics.median(wall):.3f} s ({min(wall):.3f} to "
        f"{max(wall):.3f}); load of the machine {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors",
        f"{'check':32}{'calls a step':>14}{'% of a step':>14}{'smallest':>11}{'largest':>11}",
    ]
    for kind, percents in found.items():
        calls = statistics.mean(step["calls"][kind] for step in steps) if kind in CHECKS else float("nan")
        lines.append(
            f"{kind:32}{'' if calls != calls else f'{calls:.1f}':>14}{statistics.median(percents):>14.4f}"
            f"{min(percents):>11.4f}{max(percents):>11.4f}"
        )
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="YAML file of a run on this machine")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--limit", type=amount, default=1.0, metavar="PERCENT")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    return parser.parse_intermixed_args()


def main() -> int:
    if "RANK" in os.environ:
        return be_a_rank(Path(os.environ[RESULTS]), sys.argv[1:])
    if STAGE in os.environ:
        from copd_megatron.config import load_config
        from copd_megatron.launch.torchrun import become_torchrun

        config = load_config(sys.argv[2], sys.argv[3:])
        become_torchrun(config, sys.argv[1:], program=(__file__,))
    options = parse_arguments()
    folder = Path(tempfile.mkdtemp(prefix="copd-bench-"))
    try:
        command = [sys.executable, __file__, "train", options.config, *options.overrides]
        command += [f"run.dir={folder / 'run'}"]
        done = subprocess.run(command, env=os.environ | {RESULTS: str(folder), STAGE: "1"}, check=False)
        if done.returncode:
            print(f"bench_checks: the run ended with status {done.returncode}", file=sys.stderr)
            return 2
        steps = [step for path in sorted(folder.glob("*.json")) for step in json.loads(path.read_text())[1:]]
        if not steps:
            print("bench_checks: no step after the first; raise schedule.cycles", file=sys.stderr)
            return 2
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found = shares(steps)
    print(json.dumps({"steps": steps, "percent": found}) if options.json else table(steps, found))
    return int(any(statistics.median(found[kind]) > options.limit for kind in CHECKS))


if __name__ == "__main__":
    sys.exit(main())
