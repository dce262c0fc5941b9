"""Runs tasks side by side on this machine, each once: what is done is not done again after a stop."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from copd_megatron.config import Config, to_yaml
from copd_megatron.config.load import plain
from copd_megatron.errors import ConfigError
from copd_megatron.recipes.experiments.base import Task
from copd_megatron.reproduction.forked import Program, fork
from copd_megatron.topology.layout import Layout
from copd_megatron.untrusted.json_text import load_file

Say = Callable[[str], None]
_COPD = "copd_megatron.cli.main"


class TaskFailed(RuntimeError):
    """A task ended with an error; the message names it and its log."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a task took."""

    seconds: float
    """Wall time."""
    core_seconds: float
    """CPU time of all its processes, user and system."""
    digest: str
    """Of what was asked for."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A program to be run once."""

    name: str
    folder: Path
    """Where its log, configuration and mark are kept, under its name."""
    program: Program
    after: tuple[str, ...] = ()
    """Names of jobs of the same folder."""
    cores: int = 1
    digest: str

    @property
    def key(self) -> tuple[Path, str]:
        return self.folder, self.name

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    def cost(self) -> Cost | None:
        """What it took; None if it has to be run.

        Raises:
            ConfigError: it was run with other settings.
        """
        path = self.folder / f"{self.name}.json"
        if not path.is_file():
            return None
        found = load_file(path)
        cost = Cost(**{name: found[name] for name in ("seconds", "core_seconds", "digest")})
        if cost.digest != self.digest:
            raise ConfigError(
                f"{path}: {self.name} was run with other settings. Remove {self.folder.parent} to start "
                "over, or give another --out."
            )
        return cost

    def mark(self, cost: Cost) -> None:
        """Notes that it is done."""
        path = self.folder / f"{self.name}.json"
        scratch = path.with_suffix(".tmp")
        scratch.write_text(json.dumps(asdict(cost), allow_nan=False) + "\n", encoding="utf-8")
        scratch.replace(path)


def job_of(task: Task, folder: Path) -> Job:
    """The job that runs a task of an arm: a training, the mean of several models, or one model out of a
    checkpoint."""
    words: tuple[str, ...]
    if task.merge is not None:
        if len(task.merge.models) == 1:
            words = ("checkpoint", "to-hf", task.merge.models[0], task.merge.out)
        else:
            words = ("merge", *task.merge.models, "--out", task.merge.out, "--overwrite")
        program = Program(module=_COPD, arguments=words)
        return Job(name=task.name, folder=folder, program=program, after=task.after, digest=_digest(words))
    text = to_yaml(task.config)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{task.name}.yaml"
    path.write_text(text, encoding="utf-8")
    ranks = Layout.from_config(task.config).world_size
    words = ("train", str(path), "run.overwrite=true")
    return Job(
        name=task.name,
        folder=folder,
        program=Program(module=_COPD, arguments=words, ranks=ranks),
        after=task.after,
        cores=ranks,
        digest=_digest([what_is_set(task.config)]),
    )


def what_is_set(config: Config) -> str:
    """The settings that differ from their defaults, as JSON: a setting that is new in a later version, and
    left at its default, makes no other task."""
    return json.dumps(_set(config), sort_keys=True, allow_nan=False)


def _set(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _set(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_set(inner) for inner in value]
    if not is_dataclass(value):
        return plain(value)
    return {
        field.name: _set(given)
        for field in fields(value)
        if (given := getattr(value, field.name)) != _default(field)
    }


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _digest(parts: Sequence[str]) -> str:
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()


def run_jobs(
    jobs: Sequence[Job], *, cores: int, say: Say, prepare: Callable[[], None] | None = None
) -> dict[tuple[Path, str], Cost]:
    """Runs the jobs that are not done, as many side by side as there are cores for; returns what each took.

    A job with more ranks than cores runs alone. After an interruption all that runs is ended, and the same
    call goes on with what is left.

    Args:
        prepare: called before the first job starts, if there is one to start. Jobs are forked from this
            process, so what it imports no job has to.

    Raises:
        TaskFailed: a job failed; those that ran beside it have come to their end.
        ConfigError: a job was done with other settings.
    """
    done = {job.key: cost for job in jobs if (cost := job.cost()) is not None}
    waiting = [job for job in jobs if job.key not in done]
    running: dict[int, tuple[Job, float]] = {}
    failed: list[Job] = []
    if waiting and prepare is not None:
        prepare()
    try:
        while waiting or running:
            for job in _startable(waiting, running, done, cores) if not failed else ():
                waiting.remove(job)
                running[_start(job)] = (job, time.monotonic())
            if not running:
                break
            pid, status, usage = os.wait4(-1, 0)
            if pid not in running:
                continue
            job, begun = running.pop(pid)
            if os.waitstatus_to_exitcode(status) != 0:
                failed.append(job)
                continue
            cost = Cost(
                seconds=round(time.monotonic() - begun, 1),
                core_seconds=round(usage.ru_utime + usage.ru_stime, 2),
                digest=job.digest,
            )
            job.mark(cost)
            done[job.key] = cost
            place = "/".join(job.folder.parts[-3:-1])
            say(
                f"[{len(done)}/{len(jobs)}] {place}/{job.name}: {cost.seconds:.0f} s, "
                f"{cost.core_seconds:.0f} core-seconds; {_left(waiting, running, done, cores)}"
            )
    finally:
        for pid in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGTERM)
        for pid in running:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
    if failed:
        raise TaskFailed(f"{failed[0].name} failed; its log: {failed[0].log}")
    if waiting:
        raise TaskFailed(f"{waiting[0].name} needs {', '.join(waiting[0].after)}, which nothing makes")
    return done


def _startable(
    waiting: Sequence[Job],
    running: Mapping[int, tuple[Job, float]],
    done: Mapping[tuple[Path, str], Cost],
    cores: int,
) -> list[Job]:
    free = cores - sum(job.cores for job, _ in running.values())
    found: list[Job] = []
    for job in waiting:
        ready = all((job.folder, name) in done for name in job.after)
        if ready and (job.cores <= free or (not running and not found)):
            found.append(job)
            free -= job.cores
    return found


def _start(job: Job) -> int:
    job.folder.mkdir(parents=True, exist_ok=True)
    return fork(job.program, job.log)


def _left(
    waiting: Sequence[Job],
    running: Mapping[int, tuple[Job, float]],
    done: Mapping[tuple[Path, str], Cost],
    cores: int,
) -> str:
    """How long the rest will take, by what jobs of the same name took, or the mean of all."""
    of_name: dict[str, list[float]] = {}
    for (_, name), cost in done.items():
        of_name.setdefault(name, []).append(cost.seconds)
    mean = sum(cost.seconds for cost in done.values()) / len(done)
    left = [*waiting, *(job for job, _ in running.values())]
    work = 0.0
    for job in left:
        known = of_name.get(job.name)
        work += (sum(known) / len(known) if known else mean) * min(job.cores, cores)
    minutes = work / cores / 60
    return f"about {minutes:.0f} min left" if left else "all done"
