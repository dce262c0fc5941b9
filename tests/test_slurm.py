"""Jobs on a real SLURM of three virtual nodes on this machine (``tests/slurm/cluster.sh``).

The runs are ``sbatch launchers/two_branch.sh`` as a user submits it, from a folder of its own; what they
must equal is a local run by the same launcher that nothing happens to. Needs root and Debian's slurm-wlm and
munge.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from copd_megatron.checkpoint.compare import compare_runs
from copd_megatron.checkpoint.manifest import complete_checkpoints
from tests.checkpoint_runs import BRANCHES, prepare, write_config

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "tests/slurm/cluster.sh"
LAUNCHER = ROOT / "launchers/two_branch.sh"
NUM_NODES = 3

needs_slurm = pytest.mark.skipif(
    os.geteuid() != 0
    or not all(shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin") for tool in ("slurmd", "munged")),
    reason="needs root and a SLURM: apt-get install slurm-wlm munge",
)
pytestmark = needs_slurm


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


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("slurm")
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


# --- what is refused, and what a job is made of: seconds ----------------------------------------------------


@pytest.fixture(scope="module")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.models import make_model

    root = tmp_path_factory.mktemp("config")
    make_model(root / "base", seed=1)
    return write_config(root, {name: {"tensor_model_parallel_size": 2} for name in BRANCHES})


def _jobs_at_once(cluster: Cluster, jobs: list[str]) -> None:
    for job in jobs:
        cluster.end_of(job, 60)


def test_jobs_are_checked_and_dealt_to_nodes(cluster: Cluster, tiny_config: Path) -> None:
    """Wrong sizes are refused with the right ones; sweeps and containers make the commands they should."""
    wrong = cluster.submit("--nodes=3", "--ntasks-per-node=2", str(LAUNCHER), str(tiny_config))
    tight = cluster.submit(str(LAUNCHER), str(tiny_config))
    words = ("--ntasks-per-node=2", "--export=ALL,COPD_PRINT=1")
    (cluster.folder / "sweep.txt").write_text(
        "# learning rates\noptimizer.lr=1e-4 loss.kl_coefficient=0\n\noptimizer.lr=2e-4\n"
    )
    relative = os.path.relpath(tiny_config, cluster.folder)
    sweep = cluster.submit(
        *words, "--array=2", "--output=sweep.log", "--job-name=rates", str(LAUNCHER), relative, "run.seed=7",
        COPD_SWEEP="sweep.txt",
    )  # fmt: skip
    seeds = cluster.submit(
        *words, "--array=3", "--output=seeds.log", str(LAUNCHER), str(tiny_config), "run.name=a"
    )
    image = cluster.submit(
        *words, str(LAUNCHER), str(tiny_config),
        COPD_CONTAINER="reg#img:1", COPD_CONTAINER_ENGINE="pyxis", COPD_CONTAINER_MOUNTS="/data:/d",
    )  # fmt: skip
    _jobs_at_once(cluster, [wrong, tight, sweep, seeds, image])
    assert "that is 2 nodes of 2; the job has 3. Submit it with --nodes=2" in cluster.log(wrong)
    assert cluster.record(wrong, "ExitCode") == "2:0"
    assert "ties 2 ranks to one node, which has room for 1" in cluster.log(tight)
    printed = (cluster.folder / "sweep.log").read_text()
    assert "srun --ntasks=4 --distribution=arbitrary" in printed
    assert printed.rstrip().endswith("run.seed=7 run.name=rates_2 optimizer.lr=2e-4")
    assert (cluster.folder / "seeds.log").read_text().rstrip().endswith("run.name=a_3 run.seed=3")
    assert "--container-image=reg#img:1" in cluster.log(image).replace("\\", "")
    assert "/data:/d" in cluster.log(image) and f"{ROOT}:{ROOT}" in cluster.log(image)


# --- whole runs ---------------------------------------------------------------------------------------------

NUM_CYCLES = 12
"""Of three steps each: long enough for a time limit to come in between."""


@dataclass
class Runs:
    config: Path
    undisturbed: Path

    @property
    def num_steps(self) -> int:
        return 3 * NUM_CYCLES


@pytest.fixture(scope="module")
def runs(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("runs")
    prepare(root)
    config = write_config(
        root,
        {name: {} for name in BRANCHES},
        run={"collective_timeout_seconds": 90},
        schedule={"cycles": NUM_CYCLES},
        evaluation={"every_steps": 0},
        checkpoint={"save_period": 1, "keep_last": 3, "wall_clock_limit_seconds": 1e6},
    )
    environment = {k: v for k, v in cluster.environment.items() if k != "SLURM_CONF"}
    local = subprocess.run(
        [str(LAUNCHER), str(config), f"run.dir={root / 'undisturbed'}"],
        cwd=root, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert local.returncode == 0, local.stdout + local.stderr
    return Runs(config, root / "undisturbed")


def _steps(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _ranks(run_dir: Path) -> list[int]:
    """Process ids of a run's ranks, in rank order."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().split(b"\0")
            values = dict(
                v.split(b"=", 1) for v in (process / "environ").read_bytes().split(b"\0") if b"=" in v
            )
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended meanwhile
        if b"copd_megatron.cli" in command and f"run.dir={run_dir}".encode() in command:
            found[int(values[b"SLURM_PROCID"])] = int(process.name)
    return [found[rank] for rank in sorted(found)]


def _end_well(cluster: Cluster, job: str, runs: Runs, run_dir: Path) -> None:
    assert cluster.end_of(job, 500) == ("COMPLETED", "0:0"), cluster.log(job)[-6000:]
    assert compare_runs(runs.undisturbed, run_dir) == []
    assert (run_dir / "export/merged/model.safetensors").exists()
    assert _steps(run_dir) == runs.num_steps


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_time_limit_is_survived(cluster: Cluster, runs: Runs, tmp_path: Path) -> None:
    """SLURM signals, the ranks save, the job goes back into the queue by itself and on to the same end."""
    run_dir = tmp_path / "run"
    job = cluster.submit(
        "--time=2", "--signal=B:USR1@20", str(LAUNCHER), str(runs.config), f"run.dir={run_dir}",
        OMP_NUM_THREADS="1",
    )  # fmt: skip
    _end_well(cluster, job, runs, run_dir)
    said = cluster.log(job)
    assert int(cluster.record(job, "Restarts")) >= 1, said
    assert "the time limit is near: asking the ranks to save and stop" in said
    assert re.search(r"stopping after step \d+ of \d+: SIGUSR1", said)
    assert "the ranks have saved; back into the queue" in said
    assert "resumed from" in said


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_nothing_is_lost_to_faults(cluster: Cluster, runs: Runs, tmp_path: Path) -> None:
    """A killed rank, a hung rank, a revoked node and scancel, one after the other, in one run."""
    run_dir = tmp_path / "run"
    words = ("--time=30", str(LAUNCHER), str(runs.config), f"run.dir={run_dir}")
    settings = {"OMP_NUM_THREADS": "1", "COPD_WAIT_SECONDS": "10"}
    job = cluster.submit(*words, **settings)

    def steps_more(count: int) -> None:
        done = _steps(run_dir)
        cluster.wait(job, lambda: _steps(run_dir) >= done + count, 300)

    steps_more(3)
    os.kill(_ranks(run_dir)[1], signal.SIGKILL)
    cluster.wait(job, lambda: "restart 1 of 3" in cluster.log(job), 120)
    assert "beta rank 0 (global rank 1" in cluster.log(job)
    steps_more(2)

    os.kill(_ranks(run_dir)[0], signal.SIGSTOP)
    cluster.wait(job, lambda: "restart 2 of 3" in cluster.log(job), 240)
    report = cluster.log(job).split("restart 1 of 3")[1]
    assert re.search(r"watch: beta rank 0 .* without progress for \d+ s \(limit 90 s\)", report)
    assert "waiting for: alpha rank 0 (global rank 0, dead or frozen: no heartbeat" in report
    assert re.search(r"stacks of beta rank 0:\n(.*\n)+?.*in wait", report), report
    steps_more(2)

    node = cluster.command("squeue", "-h", "-j", job, "-o", "%N").strip()
    lost = {"n[1-2]": "n2", "n[2-3]": "n3", "n[1,3]": "n3"}[node]
    cluster.command("scontrol", "update", f"nodename={lost}", "state=down", "reason=revoked")
    try:
        cluster.wait(job, lambda: cluster.record(job, "Restarts") == "1", 60)
        steps_more(2)
        assert lost not in cluster.record(job, "NodeList")
    finally:
        cluster.command("scontrol", "update", f"nodename={lost}", "state=resume")

    cluster.command("scancel", job)
    assert cluster.end_of(job, 90)[0] == "CANCELLED"
    newest = next(iter(complete_checkpoints(run_dir)))
    assert f"stopping after step {newest} of {runs.num_steps}: SIGTERM" in cluster.log(job)
    again = cluster.submit(*words, **settings)
    _end_well(cluster, again, runs, run_dir)
    assert f"step_{newest:06d}, {newest} of {runs.num_steps} steps done" in cluster.log(again)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == list(range(1, runs.num_steps + 1))
