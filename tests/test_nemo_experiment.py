"""NeMo-Run experiments: what tasks a configuration makes, and whole experiments here and on a real SLURM.

The experiments run in NeMo-Run's own environment (``copd_setup launch``), which has no torch.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

from copd_megatron.cli.main import main
from copd_megatron.config import ConfigError, load_config, validate
from copd_megatron.config.schema import Topology
from copd_megatron.hf.folder import HFFolder
from copd_megatron.launch.placement import PlacementError
from copd_megatron.plugins import EXPERIMENTS
from copd_megatron.recipes.experiments.base import tasks_of
from tests.support.checkpoint_runs import BRANCHES, prepare, write_config
from tests.support.commands import ROOT
from tests.support.domains import make_domains
from tests.support.models import make_model
from tests.support.slurm_cluster import Cluster, needs_slurm

SCRIPT = ROOT / "launchers/nemo_experiment.py"
PYTHON = ROOT / ".venv-launch/bin/python"


@pytest.fixture(scope="module")
def nemo() -> ModuleType:
    """The script as a module: NeMo-Run itself is imported by what starts an experiment only."""
    spec = importlib.util.spec_from_file_location("nemo_experiment", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("nemo")
    make_model(root / "base", seed=1)
    make_domains(root / "data", num_train=8, num_validation=4)
    return write_config(root, {"alpha": {"tensor_model_parallel_size": 2}, "beta": {}})


def test_recipes_become_tasks_that_wait_for_each_other(nemo: ModuleType, config_path: Path) -> None:
    config = load_config(config_path)
    tasks = {task.name: task for task in tasks_of(config, EXPERIMENTS.known(), Path("/out"))}
    assert {name: task.after for name, task in tasks.items()} == {
        "copd": (),
        "evaluate_copd": ("copd",),
        "expert_alpha": (),
        "expert_beta": (),
        "opd": ("expert_alpha", "expert_beta"),
        "evaluate_opd": ("opd",),
        "mixed": (),
        "evaluate_mixed": ("mixed",),
        "independent_alpha": (),
        "independent_beta": (),
        "experts_mean": ("independent_alpha", "independent_beta"),
        "evaluate_experts_mean": ("experts_mean",),
    }
    for task in tasks.values():
        validate(task.config, world_size=None, model=None)
    expert, opd = tasks["expert_beta"].config, tasks["opd"].config
    assert list(expert.branches) == ["beta"] and expert.run.dir == "/out/expert_beta"
    assert (expert.schedule.cycles, expert.schedule.rlvr_steps, expert.schedule.opd_steps) == (1, 2, 0)
    assert (opd.schedule.cycles, opd.schedule.rlvr_steps, opd.schedule.opd_steps) == (1, 0, 4)
    assert {name: branch.frozen for name, branch in opd.branches.items()} == {"alpha": False, "beta": True}
    assert opd.branches["beta"].model_path == "/out/expert_beta/export/beta"
    assert tasks["evaluate_opd"].evaluates[-1] == "/out/opd/export/alpha"
    assert tasks["evaluate_copd"].evaluates == ("/out/copd/export/merged",)
    assert load_config(config_path) == config, "the given configuration is not changed"
    evaluated = load_config(config_path, ["evaluation.every_steps=6", "checkpoint.keep_best=1"])
    for task in tasks_of(evaluated, EXPERIMENTS.known(), Path("/out")):
        validate(task.config, world_size=None, model=None)  # those that have fewer steps, too


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.path=/nowhere"], r"model\.path: /nowhere"),
        (["branches.alpha.data.train=[/nowhere/x.tar]"], "no shard matches '/nowhere/x.tar'"),
        (["branch_defaults.reward.verifiers=[nosuch]"], "unknown verifier 'nosuch'"),
        (["branch_defaults.reward.terms={sample: 1, nosuch: 1}"], "unknown verifier 'nosuch'"),
        (["opd.objective=topk", "opd.distribution.top_k=100000"], r"top_k: 100000 is more than the"),
        (["branches.alpha.parallel.tensor_model_parallel_size=3"], "3 does not divide the model's"),
        (["logging.prometheus.textfile=/nowhere/x.prom"], "/nowhere is not a folder"),
        (["end.export=false", "end.merge=false"], "end.export: false, but task evaluate_copd reads"),
        (
            ["end.export=false", "--recipes", "opd"],
            "end.export: false, but task opd reads what task expert_alpha",
        ),
        (["--recipes", "copd", "copd"], "--recipes copd copd: makes two tasks of the name copd"),
    ],
)
@pytest.mark.parametrize("executor", ["local", "slurm"])
def test_what_no_task_could_start_with_is_refused_before_the_first_one(
    nemo: ModuleType,
    config_path: Path,
    words: list[str],
    message: str,
    executor: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    where = ["--executor", executor, "--ranks-per-node", "8", "--dry-run"]
    accepted = executor == "slurm" and "textfile" in words[0]  # of another machine
    assert nemo.main([str(config_path), *where, *words]) == (0 if accepted else 2)
    assert accepted or re.search(message, capsys.readouterr().err)


def test_over_ssh_only_settings_are_checked(
    nemo: ModuleType, config_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = [str(config_path), "model.path=/there/model", "--executor", "slurm", "--dry-run"]
    there += ["--ssh", "me@login", "--job-dir", "/there/jobs"]
    assert nemo.main([*there, "--recipes", *EXPERIMENTS.known()]) == 0
    assert nemo.main([*there, "optimizer.lr=-1"]) == 2
    assert "optimizer.lr: -1.0 must be above 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("reward.terms", "{sample: 0.5, exact: 0.5}"),
        ("rollout.stop", "['#']"),
        ("rollout.temperature", "0.7"),
        ("num_generations_per_prompt", "8"),
        ("data.shuffle", "false"),
    ],
)
def test_mixed_data_needs_branches_that_learn_in_one_way(config_path: Path, key: str, value: str) -> None:
    config = load_config(config_path, [f"branches.beta.{key}={value}"])
    with pytest.raises(ConfigError, match=rf"recipe mixed: .*branches\.<name>\.{re.escape(key)} differs"):
        tasks_of(config, ["mixed"], Path("/out"))


def test_mixed_data_draws_from_all_branches_with_the_combined_budget(config_path: Path) -> None:
    config = load_config(config_path, ["branches.alpha.num_prompts_per_step=6"])
    run, evaluation = tasks_of(config, ["mixed"], Path("/out"))
    validate(run.config, world_size=None, model=None)
    (branch,) = run.config.branches.values()
    assert list(run.config.branches) == ["mixed"] and run.config.opd.topology is Topology.none
    data = {name: config.branches[name].data for name in ("alpha", "beta")}
    assert {name: (p.train, p.validation, p.weight) for name, p in branch.data.pools.items()} == {
        "alpha": (data["alpha"].train, data["alpha"].validation, 6.0),
        "beta": (data["beta"].train, data["beta"].validation, 5.0),
    }
    schedule = run.config.schedule
    assert (schedule.cycles, schedule.rlvr_steps, schedule.opd_steps) == (1, 11, 0)
    assert 11 * branch.num_prompts_per_step == 6 * (6 + 5), "both branches' prompts of six steps"
    assert evaluation.evaluates == ("/out/mixed/export/mixed",) and evaluation.config == config
    config.branches["beta"].model_path = "another"
    with pytest.raises(ConfigError, match=r"the branches start from .*another"):
        tasks_of(config, ["mixed"], Path("/out"))


def test_the_mean_of_experts_is_a_merge_between_trainings_and_evaluation(
    nemo: ModuleType, config_path: Path, tmp_path: Path
) -> None:
    config, out = load_config(config_path), tmp_path / "the out"
    alpha, _, mean, evaluation = tasks_of(config, ["experts_mean"], out)
    assert (alpha.config.schedule.rlvr_steps, alpha.config.schedule.opd_steps) == (6, 0)
    experts = [str(out / f"independent_{name}/export/{name}") for name in BRANCHES]
    for number, folder in enumerate(experts):
        make_model(Path(folder), seed=number)
    assert nemo.nodes_of(mean, 8) == (1, 1) and not mean.trains
    script = nemo.script_of(mean, project=ROOT, workdir=tmp_path, out=out, requirements="cpu")
    (command,) = re.findall(r"^copd merge .*$", script, re.M)
    _, *words = shlex.split(command)
    assert main(words) == 0 and main(words) == 0, "a task that is started again"
    merged = out / "experts_mean/export/merged"
    assert evaluation.evaluates == (*experts, str(merged))
    one, other, both = (HFFolder(folder) for folder in (*experts, merged))
    for name in both.names():
        torch.testing.assert_close(both.read(name), (one.read(name) + other.read(name)) / 2)
    with pytest.raises(ConfigError, match="a mean needs two branches"):
        tasks_of(alpha.config, ["experts_mean"], out)


def test_scripts_hold_their_configuration(nemo: ModuleType, config_path: Path, tmp_path: Path) -> None:
    config = load_config(config_path)
    task = tasks_of(config, ["copd"], Path("/out of space"))[0]
    script = nemo.script_of(
        task, project=Path("/a project"), workdir=tmp_path, out=Path("/out of space"), requirements="gpu"
    )
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    assert ". '/a project'/launchers/setup.sh\ncopd_setup gpu\n" in script
    text = re.search(r"END_OF_CONFIG'\n(.*)END_OF_CONFIG\n", script, re.S)
    assert text is not None
    (tmp_path / "back.yaml").write_text(text[1])
    assert load_config(tmp_path / "back.yaml") == task.config


def test_sizes_that_nemo_run_cannot_deal_out_are_refused(nemo: ModuleType, config_path: Path) -> None:
    train, evaluation = tasks_of(load_config(config_path), ["copd"], Path("/out"))
    assert nemo.nodes_of(train, 4) == (1, 3)
    assert nemo.nodes_of(evaluation, 4) == (1, 1)
    with pytest.raises(PlacementError, match=r"task copd: 3 ranks on 2 nodes of up to 2 .* assigns ranks"):
        nemo.nodes_of(train, 2)
    with pytest.raises(ConfigError, match="two branches or more"):
        tasks_of(tasks_of(load_config(config_path), ["opd"], Path("/o"))[0].config, ["opd"], Path())


def test_ssh_targets(nemo: ModuleType, config_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert nemo.ssh_target("me@login.cluster:2222") == ("me", "login.cluster", 2222)
    assert nemo.ssh_target("me@login")[2] == 22
    for words, says in (
        (["--ssh", "login"], "--ssh login: give user@host"),
        (["--ssh", "me@login"], "--ssh needs --job-dir"),
        (["--ranks-per-node", "2"], "use sbatch launchers/three_branch.sh"),
    ):
        assert nemo.main([str(config_path), "--executor", "slurm", *words]) == 2
        assert says in capsys.readouterr().err


# --- whole experiments -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not PYTHON.exists():
        pytest.skip("NeMo-Run's environment is not set up: . launchers/setup.sh && copd_setup launch")
    root = tmp_path_factory.mktemp("experiment")
    prepare(root)
    return write_config(
        root,
        {name: {} for name in BRANCHES},
        schedule={"cycles": 1, "rlvr_steps": 1, "opd_steps": 1},
        evaluation={"every_steps": 0},
        training={"num_mini_batches": 1},
    )


def _experiment(config: Path, home: Path, *words: str, environment: dict[str, str]) -> str:
    done = subprocess.run(
        [str(PYTHON), str(SCRIPT), str(config), "--out", str(home / "out"), *words],
        cwd=home, env=environment | {"NEMORUN_HOME": str(home / "nemo"), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


def _check_results(out: Path) -> None:
    for name in ("expert_alpha", "expert_beta", "opd"):
        lines = [json.loads(line) for line in (out / name / "metrics.jsonl").open()]
        assert lines and lines[-1]["phase"] == ("opd" if name == "opd" else "rlvr")
    table = (out / "evaluate_opd/evaluation.txt").read_text()
    for model in ("expert_alpha-export-alpha", "expert_beta-export-beta", "opd-export-alpha"):
        assert re.search(rf"^{model} ", table, re.MULTILINE)
    assert "alpha (n=4)" in table


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_training_then_evaluation_locally(run_config: Path, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "VIRTUAL_ENV", "COPD_VENV")}
    _experiment(run_config, tmp_path, "--recipes", "copd", environment=environment)
    lines = [json.loads(line) for line in (tmp_path / "out/copd/metrics.jsonl").open()]
    assert [line["phase"] for line in lines] == ["rlvr", "opd"]
    table = (tmp_path / "out/evaluate_copd/evaluation.txt").read_text()
    assert re.search(r"^merged ", table, re.MULTILINE) and "alpha (n=4)" in table


@needs_slurm
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_experts_then_distillation_then_evaluation_on_slurm(
    run_config: Path, cluster: Cluster, tmp_path: Path
) -> None:
    """Submitted at once; SLURM keeps the order."""
    words = ["--executor", "slurm", "--requirements", "cpu", "--gpus-per-node", "0", "--ranks-per-node", "1"]
    words += ["--time", "00:10:00", "--signal-seconds", "10"]
    _experiment(run_config, tmp_path, "--recipes", "opd", *words, environment=cluster.environment)
    listed = cluster.command("squeue", "-h", "-o", "%i %j %E").splitlines()
    jobs = {line.split()[1].rpartition(".")[2]: line.split()[0] for line in listed}
    assert {"expert_alpha", "expert_beta", "opd", "evaluate_opd"} <= set(jobs)
    deadline = time.monotonic() + 600
    while cluster.record(jobs["evaluate_opd"], "JobState") in ("PENDING", "RUNNING", "COMPLETING"):
        assert time.monotonic() < deadline, cluster.command("squeue")
        time.sleep(0.5)
    for name, job in jobs.items():
        assert cluster.record(job, "JobState") == "COMPLETED", name
    assert cluster.record(jobs["opd"], "NumNodes") == "2"
    _check_results(tmp_path / "out")
