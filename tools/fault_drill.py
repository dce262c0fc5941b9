#!/usr/bin/env python3
"""Kill a run again and again, restart it each time, and compare it with an undisturbed run.

    python tools/fault_drill.py configs/two_branch_tiny.yaml --kills 10 --out drill schedule.cycles=1

Single ranks, whole branches, the whole job, or its launcher alone are killed with SIGKILL: at random
instants, during saves, and during exchanges. The run does not know about the drill: which operation a rank is
in is read from outside, from the watch's entries in the job's store (the rank is stopped first, so that it is
still in it when it dies), and processes are found in /proc. Saves a checkpoint every step, unless the
overrides say otherwise.

Prints a table of the kills. The exit status is 0 if metrics (except timings), exported weights and the final
table are the same bit for bit, 1 if something differs or a run failed, and 2 if the command cannot be carried
out as given. Ten kills take a while: the same command continues where the last one ended, and with
``--seconds`` a command stops by itself, with status 75, when its time is up.
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

import _tree  # noqa: F401 - the code beside this folder
from _numbers import amount, count_or_none
from torch.distributed import DistError, PrefixStore, TCPStore

from copd_megatron.checkpoint.compare import compare_runs, metrics_of
from copd_megatron.checkpoint.manifest import MANIFEST, complete_checkpoints, step_folders
from copd_megatron.checkpoint.stop import EXIT_PREEMPTED
from copd_megatron.config import load_config
from copd_megatron.topology.layout import Layout

SAVE_OPERATIONS = ("checkpoint.prepare", "checkpoint.collect", "checkpoint.gather", "checkpoint.manifest")
WRITE = "checkpoint.write"
"""One more, unless saves are asynchronous: then a thread writes, which the watch does not see."""
EXCHANGE = ("opd.exchange",)
TRAINING = ("rollout.", "policy.", "opd.", "rewards.")
WORK = (*TRAINING, "checkpoint.", "weight_sync", "metrics")
TARGETS = ("rank", "branch", "job", "launcher")
_POLL_SECONDS = 0.0005
_ORPHAN_SECONDS = 15.0
"""How long ranks have to notice that their launcher is dead."""


@dataclass(frozen=True, kw_only=True)
class Kill:
    """What to kill, and when."""

    target: str
    """``rank``, ``branch``, ``job`` (launcher and ranks) or ``launcher`` (its ranks must die of it)."""
    rank: int
    """The rank, or one of the branch, whose operation is watched."""
    operations: tuple[str, ...]
    """Wait until it is in one of these; empty: at any instant."""
    after: float
    """Which occurrence of the operation, or after how many steps (2.3: in the third)."""

    @property
    def label(self) -> str:
        where = f"in {self.operations[0]}" if self.operations else f"after {self.after:.1f} steps"
        return f"{self.target} (rank {self.rank}) {where}"


@dataclass(kw_only=True)
class Outcome:
    """What a kill did."""

    kill: str
    seen: str
    """Operation that the watched rank was in."""
    steps_before: int
    """Steps in ``metrics.jsonl`` afterwards."""
    checkpoint: int | None
    """Newest complete checkpoint afterwards."""
    torn: list[str]
    """Checkpoints without a manifest afterwards."""
    exit_code: int
    seconds_to_end: float
    """From the kill until the job was gone."""
    num_orphans: int
    """Ranks that outlived their launcher and had to be ended."""

    @property
    def in_save(self) -> bool:
        """Whether the watched rank was saving (not searching for, or loading, a checkpoint)."""
        return any(name in self.seen for name in (*SAVE_OPERATIONS, WRITE))

    @property
    def in_exchange(self) -> bool:
        """Whether the watched rank was in an exchange between branches."""
        return any(name in self.seen for name in EXCHANGE)

    def as_text(self) -> str:
        torn = f", {', '.join(self.torn)} torn" if self.torn else ""
        orphans = f", {self.num_orphans} ranks LEFT OVER" if self.num_orphans else ""
        return (
            f"{self.kill}: seen in {self.seen!r}, {self.steps_before} steps done, newest checkpoint "
            f"{self.checkpoint}{torn}, job gone after {self.seconds_to_end} s{orphans}"
        )


class Job:
    """A run, as it can be seen from outside."""

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
        )
        self.pids: dict[int, int] = {}
        self._store: PrefixStore | None = None

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    @property
    def num_steps(self) -> int:
        """Steps in ``metrics.jsonl``."""
        metrics = self.run_dir / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    def find(self, world_size: int) -> bool:
        """Looks for the processes of the ranks and the store of the job; returns whether all are there."""
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

    def halted_in(self, rank: int, operations: Sequence[str]) -> str | None:
        """Stops a rank if it is in one of ``operations``, and returns all that it is in; else lets it
        continue."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pids[rank], signal.SIGSTOP)
        # what it sent before it stopped has reached the store once the first look is answered
        self.operation(rank)
        path = self.operation(rank)
        if any(name in path for name in operations):
            return path
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pids[rank], signal.SIGCONT)
        return None

    def kill(self, ranks: Sequence[int], *, launcher: bool) -> None:
        """Sends SIGKILL to ranks, and to the launcher before them."""
        pids = [self.pids[rank] for rank in ranks]
        if launcher:
            pids.insert(0, self.process.pid)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def end(self, timeout: float) -> tuple[int, int]:
        """Waits for the launcher and its ranks, and kills what is left; returns (exit code, ranks left
        over)."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = -1
            self.process.kill()
            self.process.wait()
        self._log.close()
        self._store = None
        deadline = time.monotonic() + _ORPHAN_SECONDS
        while (left := [pid for pid in self.pids.values() if _runs(pid)]) and time.monotonic() < deadline:
            time.sleep(0.05)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return code, len(left)


def _runs(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


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


def plan_kills(
    count: int, layout: Layout, seed: int, num_steps: int, save_operations: Sequence[str]
) -> list[Kill]:
    """``count`` kills, in an order that ``seed`` determines: a quarter or more in saves, a quarter in
    exchanges.

    The others come at random instants, early enough that ``count`` of them fit into ``num_steps``.
    """
    rng = random.Random(seed)
    kinds = ["save", "exchange"] * max(count // 4, 1) + ["any"] * count
    kinds = kinds[:count]
    rng.shuffle(kinds)
    kills = []
    for number, kind in enumerate(kinds):
        operations = {"save": (rng.choice(save_operations),), "exchange": EXCHANGE, "any": ()}[kind]
        after = rng.uniform(0, 1.5 * num_steps / count) if kind == "any" else rng.randint(1, 2)
        kills.append(
            Kill(
                target=TARGETS[number % len(TARGETS)],
                rank=rng.randrange(layout.world_size),
                operations=operations,
                after=after,
            )
        )
    return kills


def wait_for(job: Job, kill: Kill, world_size: int, step_seconds: float) -> str | None:
    """Watches the job until it is time; returns the operation seen, or None if the job ended before."""
    while job.running and not job.find(world_size):
        time.sleep(0.05)
    watch = _wait_for_operation if kill.operations else _wait_for_instant
    return watch(job, kill, step_seconds)


def _wait_for_operation(job: Job, kill: Kill, step_seconds: float) -> str | None:
    occurrences, inside = 0, False
    while job.running:
        path = job.operation(kill.rank)
        now_inside = any(name in path for name in kill.operations)
        occurrences += now_inside and not inside
        inside = now_inside
        if inside and occurrences >= kill.after and (seen := job.halted_in(kill.rank, kill.operations)):
            return seen
        time.sleep(_POLL_SECONDS)
    return None


def _wait_for_instant(job: Job, kill: Kill, step_seconds: float) -> str | None:
    steps, part = divmod(kill.after, 1)
    resumed = next(iter(complete_checkpoints(job.run_dir)), 0)
    # with steps to wait for, only once it trains: until it has resumed, the steps of the last attempt count
    work = TRAINING if steps else WORK
    begun: float | None = None
    while job.running:
        path = job.operation(kill.rank)
        if begun is None and path.startswith(work) and job.num_steps >= resumed + steps:
            begun = time.monotonic()
        if begun is not None and time.monotonic() - begun >= part * step_seconds:
            return path or "between operations"
        time.sleep(_POLL_SECONDS)
    return None


def strike(job: Job, kill: Kill, layout: Layout) -> None:
    """Kills what ``kill`` names."""
    branch = layout.branch_of(kill.rank)
    ranks = {
        "rank": [kill.rank],
        "branch": list(layout.ranks_of(branch)),
        "job": list(job.pids),
        "launcher": [],
    }[kill.target]
    job.kill(ranks, launcher=kill.target in ("job", "launcher"))


class Drill:
    """A reference run and a drilled one in a folder, and their progress."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.config: Path = options.config
        self.overrides = ["checkpoint.save_period=1", "logging.console=false", *options.overrides]
        config = load_config(self.config, self.overrides)
        self.layout = Layout.from_config(config)
        self.save_operations = SAVE_OPERATIONS if config.checkpoint.async_save else (*SAVE_OPERATIONS, WRITE)
        self.out: Path = options.out
        self.reference, self.run_dir = self.out / "reference", self.out / "drilled"
        self._report = self.out / "report.json"
        self._end = time.monotonic() + options.seconds
        order = {"config": str(self.config), "overrides": self.overrides}
        self._order = {**order, "kills": options.kills, "seed": options.seed}
        self.outcomes: list[Outcome] = []
        if self._report.exists():
            told = json.loads(self._report.read_text())
            if told["order"] != self._order:
                raise ValueError(f"{self.out} holds another drill ({told['order']}): choose another --out")
            self.outcomes = [Outcome(**outcome) for outcome in told["kills"]]

    def run(self) -> list[str]:
        """Does what is left to do; returns how the runs differ.

        Raises:
            TimeoutError: the time is up.
            RuntimeError: a run failed by itself.
        """
        if not (self.reference / "evaluation.json").exists():
            print("reference run", flush=True)
            self._finish(self.reference)
        kills = plan_kills(
            self._order["kills"],
            self.layout,
            self._order["seed"],
            len(metrics_of(self.reference)),
            self.save_operations,
        )
        for number, kill in enumerate(kills):
            if number >= len(self.outcomes):
                self.outcomes.append(self._one(number, kill))
                self._write_report(None)
            print(f"  {number + 1}. {self.outcomes[number].as_text()}", flush=True)
        if not (self.run_dir / "evaluation.json").exists():
            self._finish(self.run_dir)
        problems = compare_runs(self.reference, self.run_dir)
        problems += [f"ranks outlived {o.kill}" for o in self.outcomes if o.num_orphans]
        self._write_report(problems)
        return problems

    def _one(self, number: int, kill: Kill) -> Outcome:
        """Starts the run, kills part of it, and looks at what is left."""
        self._check_time()
        log = self.out / f"drilled_{number}.log"
        job = Job(self.config, self.overrides, self.run_dir, log)
        seen = wait_for(job, kill, self.layout.world_size, self._step_seconds())
        if seen is None:
            code, _ = job.end(60)
            why = (
                "it ended before that: give it more steps" if code == 0 else f"it failed by itself, see {log}"
            )
            raise RuntimeError(f"kill {number + 1}, {kill.label}: status {code} of the run, {why}")
        strike(job, kill, self.layout)
        begin = time.monotonic()
        code, num_orphans = job.end(90)
        folders = step_folders(self.run_dir).values()
        return Outcome(
            kill=kill.label,
            seen=seen,
            steps_before=job.num_steps,
            checkpoint=next(iter(complete_checkpoints(self.run_dir)), None),
            torn=[folder.name for folder in folders if not (folder / MANIFEST).exists()],
            exit_code=code,
            seconds_to_end=round(time.monotonic() - begin, 1),
            num_orphans=num_orphans,
        )

    def _finish(self, run_dir: Path) -> None:
        """Runs the training to its end."""
        self._check_time()
        log = self.out / f"{run_dir.name}_to_the_end.log"
        code, _ = Job(self.config, self.overrides, run_dir, log).end(3600)
        if code != 0:
            raise RuntimeError(f"the run in {run_dir} ended with status {code}, see {log}")

    def _check_time(self) -> None:
        if time.monotonic() > self._end:
            raise TimeoutError(f"{len(self.outcomes)} kills done; run the same command again to continue")

    def _step_seconds(self) -> float:
        """The longest step of the reference run: the first after a start, which warms up."""
        return max(
            value
            for line in (self.reference / "metrics.jsonl").read_text().splitlines()
            for name, value in json.loads(line).items()
            if name.endswith("/timing/step_seconds")
        )

    def _write_report(self, problems: list[str] | None) -> None:
        report = {
            "order": self._order,
            "kills": [asdict(outcome) for outcome in self.outcomes],
            "num_in_saves": sum(outcome.in_save for outcome in self.outcomes),
            "num_in_exchanges": sum(outcome.in_exchange for outcome in self.outcomes),
            "differences": problems,
        }
        partial = self._report.with_suffix(".partial")
        partial.write_text(json.dumps(report, indent=1) + "\n")
        partial.replace(self._report)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--kills", type=count_or_none, default=10)
    parser.add_argument("--seed", type=count_or_none, default=0, help="determines what is killed, and when")
    parser.add_argument(
        "--seconds",
        type=amount,
        default=float("inf"),
        help="start nothing more after this; default: none",
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for both runs, the logs and the report"
    )
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        drill = Drill(options)
        problems = drill.run()
    except TimeoutError as error:
        print(error)
        return EXIT_PREEMPTED
    except (ValueError, RuntimeError) as error:
        print(f"fault_drill: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    for problem in problems[:20]:
        print(f"  {problem}")
    saves = sum(outcome.in_save for outcome in drill.outcomes)
    exchanges = sum(outcome.in_exchange for outcome in drill.outcomes)
    print(f"{len(drill.outcomes)} kills ({saves} in saves, {exchanges} in exchanges): "
          f"{'bit for bit the same run' if not problems else f'{len(problems)} differences'}")  # fmt: skip
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
