"""A real SLURM of virtual nodes on this machine (``tests/slurm/cluster.sh``)."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.commands import ROOT

CLUSTER = ROOT / "tests/slurm/cluster.sh"
NUM_NODES = 3

needs_slurm = pytest.mark.skipif(
    os.geteuid() != 0
    or not all(shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin") for tool in ("slurmd", "munged")),
    reason="needs root and a SLURM: apt-get install slurm-wlm munge",
)


@dataclass
class Cluster:
    """The cluster and the folder that jobs are submitted from."""

    folder: Path
    environment: dict[str, str]
    jobs: list[str] = field(default_factory=list)

    def command(self, *words: str) -> str:
        """Runs one of SLURM's commands; its output."""
        done = subprocess.run(
            words, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *words: str, **environment: str) -> str:
        """``sbatch`` with settings for these nodes; the job's number. Its output is in <number>.log."""
        sizes = ("--nodes=2", "--ntasks-per-node=1", "--gres=none", "--output=%j.log")
        done = subprocess.run(
            ["sbatch", "--parsable", *sizes, *words],
            cwd=self.folder, env=self.environment | environment, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        self.jobs.append(done.stdout.strip())
        return self.jobs[-1]

    def record(self, job: str, name: str) -> str:
        """A field of ``scontrol show job``."""
        found = re.search(rf"\b{name}=(\S*)", self.command("scontrol", "--oneliner", "show", "job", job))
        assert found is not None, f"job {job} has no {name}"
        return found[1]

    def log(self, job: str) -> str:
        path = self.folder / f"{job}.log"
        return path.read_text() if path.exists() else ""

    def wait(self, job: str, until: Callable[[], bool], seconds: float) -> None:
        """Until something is true of a job that must not end before."""
        deadline = time.monotonic() + seconds
        while not until():
            state = self.record(job, "JobState")
            over = state not in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED") and not until()
            assert not over and time.monotonic() < deadline, f"{state}\n{self.log(job)[-6000:]}"
            time.sleep(0.1)

    def end_of(self, job: str, seconds: float) -> tuple[str, str]:
        """Waits for the job's end: its state and exit status."""
        deadline = time.monotonic() + seconds
        while (state := self.record(job, "JobState")) in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED"):
            assert time.monotonic() < deadline, f"{state}\n{self.log(job)[-6000:]}"
            time.sleep(0.2)
        return state, self.record(job, "ExitCode")


@contextlib.contextmanager
def running_cluster(folder: Path) -> Iterator[Cluster]:
    """Brings the cluster up in ``folder``, and down at the end of the block."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "RANK"))}
    environment |= {
        "SLURM_CONF": str(folder / "cluster/slurm.conf"),
        "COPD_REQUIREMENTS": "cpu",
        "COPD_VENV": os.environ.get("VIRTUAL_ENV", str(ROOT / ".venv")),
        "PYTHONWARNINGS": "ignore",
    }
    subprocess.run(
        [str(CLUSTER), "up", str(folder / "cluster"), str(NUM_NODES), "2"], check=True, timeout=120
    )
    submits = folder / "submitted from"
    submits.mkdir()
    try:
        yield Cluster(submits, environment)
    finally:
        subprocess.run([str(CLUSTER), "down", str(folder / "cluster")], check=True, timeout=180)
