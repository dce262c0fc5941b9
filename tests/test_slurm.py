"""Jobs on a real SLURM of three virtual nodes on this machine (``tests/slurm/cluster.sh``).

The runs are ``sbatch launchers/two_branch.sh`` and ``three_branch.sh`` as a user submits them, from a folder
of their own; what they must equal is a local run by the same launcher that nothing happens to. Needs root and
Debian's slurm-wlm and munge.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from copd_megatron.checkpoint.compare import compare_runs
from copd_megatron.checkpoint.manifest import complete_checkpoints
from copd_megatron.tiny.vl import make_visual_base, make_visual_data
from copd_megatron.tiny.vl_recipe import VL_BASE
from tests.support.checkpoint_runs import BRANCHES, prepare, write_config
from tests.support.commands import ROOT
from tests.support.domains import make_domains
from tests.support.slurm_cluster import Cluster, needs_slurm

LAUNCHER = ROOT / "launchers/two_branch.sh"
THREE_BRANCH_LAUNCHER = ROOT / "launchers/three_branch.sh"
NUM_CYCLES = 20
"""Of three steps: for a minute or so after the first there are more to come."""
NUM_VISUAL_CYCLES = 18
"""Of three steps, of a second or more."""
TIMEOUT_SECONDS = 75
"""Of a collective; longer than any part of the start takes on a busy machine."""

pytestmark = needs_slurm


# --- what is refused, and what a job is made of: seconds ----------------------------------------------------


@pytest.fixture(scope="module")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support.models import make_model

    root = tmp_path_factory.mktemp("config")
    make_model(root / "base", seed=1)
    make_domains(root / "data", num_train=4, num_validation=2)
    return write_config(root, {name: {"tensor_model_parallel_size": 2} for name in BRANCHES})


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
    shards = str(tiny_config.parent / "data/alpha-train-*.tar")
    data = (f"data.train=[{shards}]", f"data.validation=[{shards}]", "reward.verifiers=[numeric]")
    image = cluster.submit(
        *words, str(LAUNCHER), str(tiny_config),
        COPD_CONTAINER="reg#img:1", COPD_CONTAINER_ENGINE="pyxis", COPD_CONTAINER_MOUNTS="/data:/d",
    )  # fmt: skip
    three = cluster.submit(
        "--nodes=3", "--export=ALL,COPD_PRINT=1", str(THREE_BRANCH_LAUNCHER),
        "configs/three_branch_tiny.yaml", f"model.path={tiny_config.parent / 'base'}",
        *(f"branches.{name}.{setting}" for name in ("text", "image", "video") for setting in data),
    )  # fmt: skip
    for job in (wrong, tight, sweep, seeds, image, three):
        cluster.end_of(job, 60)
    assert "3 ranks on 3 x 1: text on 1 node, image on 1 node, video on 1 node" in cluster.log(three)
    # two of the three nodes hang on one switch: the hub shares it with a spoke
    assert "text on 1 switch, image on 1 switch, video on 1 switch; 2 edges" in cluster.log(three)
    assert "srun --ntasks=3 --distribution=arbitrary" in cluster.log(three)
    assert "that is 2 nodes of 2; the job has 3. Submit it with --nodes=2" in cluster.log(wrong)
    assert cluster.record(wrong, "ExitCode") == "2:0"
    assert "ties 2 ranks to one node, which has room for 1" in cluster.log(tight)
    printed = (cluster.folder / "sweep.log").read_text()
    assert "srun --ntasks=4 --distribution=arbitrary" in printed
    assert printed.rstrip().endswith("run.seed=7 run.name=rates_2 optimizer.lr=2e-4")
    assert (cluster.folder / "seeds.log").read_text().rstrip().endswith("run.name=a_3 run.seed=3")
    assert "--container-image=reg#img:1" in cluster.log(image).replace("\\", "")
    assert "/data:/d" in cluster.log(image) and f"{ROOT}:{ROOT}" in cluster.log(image)


REFUSED_BY_RANKS = """
from copd_megatron.errors import ConfigError
from copd_megatron.recipes.base import Recipe

class Refused(Recipe):
    def check(self, config):
        raise ConfigError("refused by every rank")

RECIPE = Refused(stages=())
"""


@pytest.mark.slow
def test_what_no_restart_can_mend_is_not_started_again(cluster: Cluster, tiny_config: Path) -> None:
    """The ranks' exit status reaches the job through srun."""
    tiny_config.with_name("refused_recipe.py").write_text(REFUSED_BY_RANKS)
    path = os.pathsep.join([str(tiny_config.parent), os.environ.get("PYTHONPATH", "")])
    settings = ["branch_defaults.parallel.tensor_model_parallel_size=1"]
    settings += [f"branches.{name}.parallel.tensor_model_parallel_size=1" for name in BRANCHES]
    settings.append("recipe=refused_recipe:RECIPE")
    job = cluster.submit(str(LAUNCHER), str(tiny_config), *settings, PYTHONPATH=path)
    assert cluster.end_of(job, 400) == ("FAILED", "78:0"), cluster.log(job)[-4000:]
    assert "refused by every rank" in cluster.log(job)
    assert "failed in a way that no restart can mend" in cluster.log(job)
    assert "restart 1 of" not in cluster.log(job)


# --- whole runs ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Runs:
    """What a job is given, and what that gives when nothing happens to it."""

    words: tuple[str, ...]
    """The launcher and its arguments."""
    folder: Path
    """Where it is started: relative paths begin here."""
    undisturbed: Path
    num_nodes: int
    num_steps: int

    def make_undisturbed(self, cluster: Cluster) -> None:
        """The run directory to compare with, by the same launcher outside SLURM."""
        environment = {k: v for k, v in cluster.environment.items() if k != "SLURM_CONF"}
        local = subprocess.run(
            [*self.words, f"run.dir={self.undisturbed}"],
            cwd=self.folder, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
            timeout=600,
        )  # fmt: skip
        assert local.returncode == 0, local.stdout + local.stderr


def _folder_of(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """COPD_TEST_RUNS names a folder that keeps what is made between invocations, for work on these tests."""
    kept = os.environ.get("COPD_TEST_RUNS")
    if kept is None:
        return tmp_path_factory.mktemp(name)
    folder = Path(kept) / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def runs(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Of two branches that read text."""
    root = _folder_of("two_branch", tmp_path_factory)
    config = root / "run_0.yaml"
    made = Runs(
        words=(str(LAUNCHER), str(config)),
        folder=cluster.folder,
        undisturbed=root / "undisturbed",
        num_nodes=2,
        num_steps=3 * NUM_CYCLES,
    )
    if (made.undisturbed / "export/merged").exists():
        return made
    prepare(root)
    written = write_config(
        root,
        {name: {} for name in BRANCHES},
        run={"collective_timeout_seconds": TIMEOUT_SECONDS},
        schedule={"cycles": NUM_CYCLES},
        evaluation={"every_steps": 0},
        checkpoint={"save_period": 1, "keep_last": 3, "wall_clock_limit_seconds": 1e6},
    )
    assert written == config
    made.make_undisturbed(cluster)
    return made


@pytest.fixture(scope="module")
def visual_runs(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Of the quickstart's three branches, text, image and video, with less of everything: a base that is
    right now and then, and small steps of its recipe's own tasks."""
    root = _folder_of("three_branch", tmp_path_factory)
    recipe = dataclasses.replace(
        VL_BASE,
        pool_size=120,
        num_train=60,
        num_validation=12,
        warm_up=dataclasses.replace(VL_BASE.warm_up, num_steps=150, batch_size=18),
    )
    # where the configuration, which the job takes as it is shipped, looks for them
    make_visual_data(root / ".cache/tiny_vl_data", recipe)
    make_visual_base(root / ".cache/tiny_vl", recipe)
    overrides = (
        "branch_defaults.num_prompts_per_step=3",
        "opd.num_prompts_per_step=2",
        f"schedule.cycles={NUM_VISUAL_CYCLES}",
        "schedule.rlvr_steps=1",
        "schedule.opd_steps=2",
        "evaluation.max_prompts=6",
        "checkpoint.save_period=1",
        "checkpoint.keep_last=3",
        "checkpoint.wall_clock_limit_seconds=1e6",
        "logging.console=false",
    )
    made = Runs(
        words=(str(THREE_BRANCH_LAUNCHER), "configs/three_branch_tiny.yaml", *overrides),
        folder=root,
        undisturbed=root / "undisturbed",
        num_nodes=3,
        num_steps=3 * NUM_VISUAL_CYCLES,
    )
    if not (made.undisturbed / "export/merged").exists():
        made.make_undisturbed(cluster)
    return made


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
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it has ended meanwhile, or is none of ours
        if b"copd_megatron.cli" in command and f"run.dir={run_dir}".encode() in command:
            found[int(values[b"SLURM_PROCID"])] = int(process.name)
    return [found[rank] for rank in sorted(found)]


class Job:
    """A submitted run whose steps can be waited for."""

    def __init__(self, cluster: Cluster, runs: Runs, run_dir: Path) -> None:
        self.cluster = dataclasses.replace(cluster, folder=runs.folder)
        self.runs, self.run_dir = runs, run_dir
        self.number = self._submit()

    def _submit(self) -> str:
        return self.cluster.submit(
            "--time=30", "--signal=B:USR1@25", f"--nodes={self.runs.num_nodes}", *self.runs.words,
            f"run.dir={self.run_dir}", OMP_NUM_THREADS="1", COPD_WAIT_SECONDS="10",
        )  # fmt: skip

    def submit_again(self) -> None:
        self.number = self._submit()

    def steps_more(self, count: int) -> None:
        wanted = _steps(self.run_dir) + count
        self.until(lambda: _steps(self.run_dir) >= wanted, 300)

    def until(self, condition: Callable[[], bool], seconds: float) -> None:
        self.cluster.wait(self.number, condition, seconds)

    def says(self, text: str) -> Callable[[], bool]:
        return lambda: text in self.log

    @property
    def log(self) -> str:
        return self.cluster.log(self.number)

    def restarts(self, count: int) -> Callable[[], bool]:
        return lambda: self.cluster.record(self.number, "Restarts") == str(count)

    def meets_its_time_limit(self) -> None:
        """Brings the limit near, and waits until the job is in the queue again, with another limit."""
        # SLURM looks every half minute: the signal comes up to 30 s before the 25 that are asked for
        self.cluster.command("scontrol", "update", f"jobid={self.number}", "endtime=now+45")
        self.until(self.restarts(1), 120)
        self.cluster.command("scontrol", "update", f"jobid={self.number}", "timelimit=30")

    def is_cancelled(self) -> int:
        """Ends the job by ``scancel``; the step of its newest checkpoint."""
        self.cluster.command("scancel", self.number)
        assert self.cluster.end_of(self.number, 90)[0] == "CANCELLED"
        newest = next(iter(complete_checkpoints(self.run_dir)))
        said = f"stopping after step {newest} of {self.runs.num_steps}: SIGTERM"
        assert said in self.log, self.log
        return newest

    def ends_well(self) -> None:
        assert self.cluster.end_of(self.number, 400) == ("COMPLETED", "0:0"), self.log[-6000:]
        assert compare_runs(self.runs.undisturbed, self.run_dir) == []
        assert (self.run_dir / "export/merged/model.safetensors").exists()
        lines = [json.loads(line) for line in (self.run_dir / "metrics.jsonl").open()]
        assert [line["step"] for line in lines] == list(range(1, self.runs.num_steps + 1))


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_time_limit_is_survived(cluster: Cluster, runs: Runs, tmp_path: Path) -> None:
    """SLURM signals, the ranks save, the job goes back into the queue by itself and on to the same end."""
    job = Job(cluster, runs, tmp_path / "run")
    job.steps_more(1)
    job.meets_its_time_limit()
    job.ends_well()
    assert "the time limit is near: asking the ranks to save and stop" in job.log
    assert re.search(rf"stopping after step \d+ of {runs.num_steps}: SIGUSR1", job.log), job.log
    assert "the ranks have saved; back into the queue" in job.log
    assert re.search(rf"resumed from .*, \d+ of {runs.num_steps} steps done", job.log)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_and_hung_ranks_lose_nothing(cluster: Cluster, runs: Runs, tmp_path: Path) -> None:
    """Both are reported and the ranks start again in the same allocation."""
    job = Job(cluster, runs, tmp_path / "run")
    job.steps_more(3)
    os.kill(_ranks(job.run_dir)[1], signal.SIGKILL)
    job.until(job.says("restart 1 of 3"), 120)
    assert re.search(r"waiting for: beta rank 0 \(global rank 1, dead or frozen: no heartbeat", job.log), (
        job.log
    )
    job.steps_more(2)

    os.kill(_ranks(job.run_dir)[0], signal.SIGSTOP)
    job.until(job.says("restart 2 of 3"), 60 + 2 * TIMEOUT_SECONDS)
    report = job.log.split("restart 1 of 3")[1]
    limit = rf"without progress for \d+ s \(limit {TIMEOUT_SECONDS} s\)"
    assert re.search(rf"watch: beta rank 0 \(global rank 1\) in operation '.+' {limit}", report), report
    assert "waiting for: alpha rank 0 (global rank 0), frozen: it serves the job's store" in report
    assert "stacks of beta rank 0:" in report and '.py", line' in report.split("stacks of beta rank 0:")[1]
    job.ends_well()
    assert cluster.record(job.number, "Restarts") == "0"


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_revoked_node_and_scancel_lose_nothing(cluster: Cluster, runs: Runs, tmp_path: Path) -> None:
    """The job goes on on other nodes; cancelled, it leaves a checkpoint of its last step."""
    job = Job(cluster, runs, tmp_path / "run")
    job.steps_more(3)
    nodes = cluster.command("scontrol", "show", "hostnames", cluster.record(job.number, "NodeList")).split()
    cluster.command("scontrol", "update", f"nodename={nodes[1]}", "state=down", "reason=revoked")
    try:
        job.until(job.restarts(1), 60)
        job.steps_more(2)
        left = cluster.command("scontrol", "show", "hostnames", cluster.record(job.number, "NodeList"))
        assert nodes[1] not in left.split()
    finally:
        cluster.command("scontrol", "update", f"nodename={nodes[1]}", "state=resume")

    newest = job.is_cancelled()
    job.submit_again()
    job.ends_well()
    assert f"step_{newest:06d}, {newest} of {runs.num_steps} steps done" in job.log


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_three_branches_survive_a_time_limit_and_scancel(
    cluster: Cluster, visual_runs: Runs, tmp_path: Path
) -> None:
    """Text, image and video on a node each, with real images and videos."""
    job = Job(cluster, visual_runs, tmp_path / "run")
    job.steps_more(1)
    job.meets_its_time_limit()
    job.steps_more(2)
    newest = job.is_cancelled()
    first = job.log
    job.submit_again()
    job.ends_well()
    assert "3 ranks on 3 x 1: text on 1 node, image on 1 node, video on 1 node" in first
    assert "the ranks have saved; back into the queue" in first
    saved, resumed = (
        re.search(rf"{said} of {visual_runs.num_steps}", first)
        for said in (r"stopping after step (\d+)", r"resumed from .*, (\d+)")
    )
    assert saved is not None and resumed is not None and saved[1] == resumed[1], first
    assert f"step_{newest:06d}, {newest} of {visual_runs.num_steps} steps done" in job.log
    assert {path.name for path in (job.run_dir / "export").iterdir()} == {"text", "image", "video", "merged"}
    last = json.loads((job.run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    for branch in ("image", "video"):
        assert last[f"{branch}/media/decoded"] > 0 and last[f"{branch}/media/failed"] == 0
