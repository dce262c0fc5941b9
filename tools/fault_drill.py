#!/usr/bin/env python3
"""Kill a run again and again, start it again each time, and compare it with a run nobody disturbed.

    python tools/fault_drill.py configs/two_branch_tiny.yaml --kills 10 --out drill schedule.cycles=1

Ranks, whole branches and the whole job are killed with SIGKILL: at random instants, inside saves and inside
exchanges. Nothing in the run knows of the drill: which operation a rank is in is read from outside, off the
watch's entries in the job's store, and processes are found in /proc. Saves checkpoints every step, unless the
overrides say otherwise. Prints a table of the kills; the exit status is 0 if metrics (timings aside),
exported weights and the final table are the same, bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torch.distributed import DistError, PrefixStore, TCPStore

from copd_megatron.checkpoint.compare import compare_runs, metrics_of
from copd_megatron.checkpoint.manifest import complete_checkpoints
from copd_megatron.config import load_config
from copd_megatron.topology.layout import Layout

SAVE_OPERATIONS = ("checkpoint.write", "checkpoint.collect", "checkpoint.gather", "checkpoint.manifest")
EXCHANGE = ("opd.exchange",)
WORK = ("rollout.", "policy.", "opd.", "checkpoint.", "weight_sync", "metrics", "rewards.")
_POLL_SECONDS = 0.0005


@dataclass(frozen=True, kw_only=True)
class Kill:
    """What to kill, and when."""

    target: str
    """``rank``, ``branch`` or ``job``."""
    rank: int
    """The rank, or one of the branch, whose operation is watched."""
    operations: tuple[str, ...]
    """Wait until it is in one of these; empty: after a while of training."""
    after: float
    """How far into the training (seconds), or which occurrence of the operation."""

    @property
    def label(self) -> str:
        where = f"in {self.operations[0]}" if self.operations else f"{self.after:.1f} s into the training"
        return f"{self.target} (rank {self.rank}) {where}"


@dataclass(kw_only=True)
class Outcome:
    """What a kill did."""

    kill: str
    seen: str
    """Operation that the watched rank was in."""
    steps_before: int
    checkpoint: int | None
    """Newest whole checkpoint afterwards."""
    exit_code: int
    seconds_to_end: float
    """From the kill until the job was gone."""


class Job:
    """A run in a process group of its own, with what can be seen of it from outside."""

    def __init__(self, config: Path, overrides: Sequence[str], run_dir: Path, log: Path) -> None:
        self.run_dir = run_dir
        command = [sys.executable, "-m", "copd_megatron.cli", "train", str(config), *overrides]
        environment = {**os.environ, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "20"}
        self._log = log.open("ab")
        self.process = subprocess.Popen(
            [*command, f"run.dir={run_dir}"],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        self.pids: dict[int, int] = {}
        self._store: PrefixStore | None = None

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def find(self, world_size: int) -> bool:
        """Looks for the ranks' processes and the job's store; whether all are there."""
        environments = {}
        for pid in _children(self.process.pid):
            environment = _environment(pid)
            if "RANK" in environment and "COPD_RUN_ID" in environment:
                self.pids[int(environment["RANK"])] = pid
                environments[pid] = environment
        if len(self.pids) < world_size or not environments:
            return False
        if self._store is None:
            environment = next(iter(environments.values()))
            tcp = TCPStore("127.0.0.1", int(environment["MASTER_PORT"]), None, False, timedelta(seconds=5))
            self._store = PrefixStore(environment["COPD_RUN_ID"], PrefixStore("copd/attempt_0", tcp))
        return True

    def operation(self, rank: int) -> str:
        """What a rank is doing, as its watch says, joined by `` > ``; empty: nothing, or unknown."""
        assert self._store is not None
        key = f"watch/state/{rank}"
        try:
            if not self._store.check([key]):
                return ""
            return self._store.get(key).decode().split("\t")[2]
        except DistError:
            return ""

    def kill(self, ranks: Sequence[int], *, launcher: bool) -> None:
        """SIGKILL for ranks, and for the launcher with them."""
        pids = [self.pids[rank] for rank in ranks]
        if launcher:
            pids.insert(0, self.process.pid)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def end(self, timeout: float) -> int:
        """Waits for the launcher, then ends what is left of its process group; its exit code."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = -1
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._log.close()
        # the ranks lead sessions of their own
        for pid in self.pids.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._store = None
        return code


def _children(pid: int) -> Iterator[int]:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            yield from map(int, (task / "children").read_text().split())


def _environment(pid: int) -> dict[str, str]:
    try:
        raw = Path(f"/proc/{pid}/environ").read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return {}
    pairs = (entry.decode(errors="replace").partition("=") for entry in raw.split(b"\0") if b"=" in entry)
    return {name: value for name, _, value in pairs}


def plan_kills(count: int, layout: Layout, seed: int, training_seconds: float) -> list[Kill]:
    """``count`` kills, in an order drawn by ``seed``: at least a quarter in saves, a quarter in exchanges."""
    rng = random.Random(seed)
    kinds = ["save", "exchange"] * max(count // 4, 1) + ["any"] * count
    kinds = kinds[:count]
    rng.shuffle(kinds)
    kills = []
    for number, kind in enumerate(kinds):
        operations = {"save": (rng.choice(SAVE_OPERATIONS),), "exchange": EXCHANGE, "any": ()}[kind]
        after = rng.uniform(0, training_seconds / 3) if kind == "any" else rng.randint(1, 2)
        kills.append(
            Kill(
                target=("rank", "branch", "job")[number % 3],
                rank=rng.randrange(layout.world_size),
                operations=operations,
                after=after,
            )
        )
    return kills


def wait_for(job: Job, kill: Kill, world_size: int) -> str | None:
    """Watches the job until it is time; the operation seen, or None if the job ended before."""
    while job.running and not job.find(world_size):
        time.sleep(0.05)
    begun: float | None = None
    occurrences, inside = 0, False
    while job.running:
        path = job.operation(kill.rank)
        if kill.operations:
            now_inside = any(name in path for name in kill.operations)
            occurrences += now_inside and not inside
            inside = now_inside
            if inside and occurrences >= kill.after:
                return path
        else:
            if begun is None and path.startswith(WORK):
                begun = time.monotonic()
            if begun is not None and time.monotonic() - begun >= kill.after:
                return path or "between operations"
        time.sleep(_POLL_SECONDS)
    return None


def strike(job: Job, kill: Kill, layout: Layout) -> None:
    """Kills what the plan says."""
    branch = layout.branch_of(kill.rank)
    ranks = {"rank": [kill.rank], "branch": list(layout.ranks_of(branch)), "job": list(job.pids)}[kill.target]
    job.kill(ranks, launcher=kill.target == "job")


def drill(
    config: Path, overrides: Sequence[str], out: Path, layout: Layout, kills: Sequence[Kill]
) -> list[Outcome]:
    """Runs, kills and restarts until the plan is through, then lets the run finish."""
    run_dir = out / "drilled"
    outcomes: list[Outcome] = []
    for number, kill in enumerate(kills):
        job = Job(config, overrides, run_dir, out / f"drilled_{number}.log")
        seen = wait_for(job, kill, layout.world_size)
        if seen is None:
            code = job.end(60)
            print(f"  the run ended (status {code}) before kill {number + 1}: {kill.label}", flush=True)
            if code != 0:
                raise RuntimeError(f"the run failed by itself, see {out}/drilled_{number}.log")
            break
        strike(job, kill, layout)
        begin = time.monotonic()
        code = job.end(90)
        outcome = Outcome(
            kill=kill.label,
            seen=seen,
            steps_before=len(metrics_of(run_dir)) if (run_dir / "metrics.jsonl").exists() else 0,
            checkpoint=next(iter(complete_checkpoints(run_dir)), None),
            exit_code=code,
            seconds_to_end=round(time.monotonic() - begin, 1),
        )
        outcomes.append(outcome)
        print(
            f"  {number + 1}. {outcome.kill}: seen in {outcome.seen!r}, {outcome.steps_before} steps done, "
            f"newest checkpoint {outcome.checkpoint}, job gone after {outcome.seconds_to_end} s",
            flush=True,
        )
    _finish(config, overrides, run_dir, out / "drilled_last.log")
    return outcomes


def _finish(config: Path, overrides: Sequence[str], run_dir: Path, log: Path) -> None:
    code = Job(config, overrides, run_dir, log).end(3600)
    if code != 0:
        raise RuntimeError(f"the run in {run_dir} ended with status {code}, see {log}")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="draws what is killed when")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for both runs, the logs and the report"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    overrides = ["checkpoint.save_period=1", "logging.console=false", *options.overrides]
    layout = Layout.from_config(load_config(options.config, overrides))
    options.out.mkdir(parents=True, exist_ok=True)
    reference = options.out / "reference"
    if not (reference / "evaluation.json").exists():
        print("reference run", flush=True)
        _finish(options.config, overrides, reference, options.out / "reference.log")
    seconds = sum(
        max(v for k, v in json.loads(line).items() if k.endswith("/timing/step_seconds"))
        for line in (reference / "metrics.jsonl").read_text().splitlines()
    )
    kills = plan_kills(options.kills, layout, options.seed, seconds)
    print(f"{len(kills)} kills", flush=True)
    outcomes = drill(options.config, overrides, options.out, layout, kills)
    problems = compare_runs(reference, options.out / "drilled")
    report = {"kills": [asdict(outcome) for outcome in outcomes], "differences": problems}
    (options.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    for problem in problems[:20]:
        print(f"  {problem}")
    saves = sum("checkpoint." in outcome.seen for outcome in outcomes)
    exchanges = sum("opd.exchange" in outcome.seen for outcome in outcomes)
    print(f"{len(outcomes)} kills ({saves} in saves, {exchanges} in exchanges): "
          f"{'bit for bit the same run' if not problems else f'{len(problems)} differences'}")  # fmt: skip
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
