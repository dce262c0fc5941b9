#!/usr/bin/env python3
"""Recipes as one NeMo-Run experiment, on this machine or on a SLURM cluster (from a login node or over SSH).

    . launchers/setup.sh && copd_setup launch
    python launchers/nemo_experiment.py configs/two_branch_tiny.yaml run.seed=2
    python launchers/nemo_experiment.py configs/three_branch_qwen3_vl_4b.yaml --recipes copd opd \\
        --executor slurm --account a --partition p --ssh me@login.cluster --project /shared/copd-megatron

Recipes, each followed by an evaluation of what it made:

    copd    the configuration as it is: branches that teach each other
    opd     the same number of steps in sequence: reinforcement learning makes an expert of every branch, then
            the first branch's expert learns by distillation from the other experts, which are frozen
    mixed   reinforcement learning of one model on the data of all branches, with as many prompts as all
            branches together
    experts_mean
            reinforcement learning makes an expert of every branch, with as many steps as both phases have;
            the mean of the experts is the model

A task starts when the tasks that it needs are done (experts, then distillation, then evaluation). Independent
tasks run in parallel on SLURM. ``--dry-run`` shows the tasks with their configurations. Settings, models and
data are checked before the first task starts; with --ssh, which has models and data elsewhere, the settings
alone. A task that is started again continues from its newest valid checkpoint; on SLURM this happens
automatically after a failure or at the time limit (--retries).
Results are in ``<out>/<task>``; ``<out>`` is ``runs/<run.name>_experiment`` by default.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from copd_megatron.config import Config, ConfigError, load_config, read_model_shapes, to_yaml, validate
from copd_megatron.launch.device import check_device
from copd_megatron.launch.placement import PlacementError, place
from copd_megatron.launch.preflight import check_files, named_verifiers
from copd_megatron.metrics.places import check_textfile
from copd_megatron.recipes.experiments.base import Task, as_it_starts, tasks_of
from copd_megatron.rewards.registry import refuse_unknown
from copd_megatron.topology.layout import Layout

PROJECT = Path(__file__).resolve().parents[1]


def script_of(task: Task, *, project: Path, workdir: Path, out: Path, requirements: str) -> str:
    """The shell script of a task. Under srun every rank runs it; elsewhere it is the whole local run."""
    quoted = {name: shlex.quote(str(value)) for name, value in
              {"project": project, "workdir": workdir, "name": task.name, "out": out}.items()}  # fmt: skip
    if task.evaluates:
        folders = " ".join(map(shlex.quote, task.evaluates))
        command = (
            f"mkdir -p {quoted['out']}/{quoted['name']}\n"
            f'copd eval "$config" {folders} --out {quoted["out"]}/{quoted["name"]} |\n'
            f"    tee {quoted['out']}/{quoted['name']}/evaluation.txt"
        )
    elif task.merge is not None:
        models, target = " ".join(map(shlex.quote, task.merge.models)), shlex.quote(task.merge.out)
        command = f"copd merge {models} --out {target} --overwrite"
    else:
        command = 'copd train "$config"'
    return f"""set -euo pipefail
cd {quoted["workdir"]}
. {quoted["project"]}/launchers/setup.sh
copd_setup {requirements}
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 TOKENIZERS_PARALLELISM=false
export COPD_LAUNCHER=${{SLURM_STEP_ID:+srun}}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
config=$folder/{quoted["name"]}.yaml
cat >"$config" <<'END_OF_CONFIG'
{to_yaml(task.config).rstrip()}
END_OF_CONFIG
{command}
"""


def nodes_of(task: Task, ranks_per_node: int) -> tuple[int, int]:
    """(number of nodes, ranks per node) of a task on SLURM.

    Raises:
        PlacementError: NeMo-Run fills nodes in rank order with equal numbers of ranks, and these branches do
            not fit that.
    """
    if not task.trains:
        return 1, 1
    layout = Layout.from_config(task.config)
    nodes = place(layout, num_nodes=None, ranks_per_node=ranks_per_node).num_nodes
    per_node, rest = divmod(layout.world_size, nodes)
    even = None if rest else place(layout, num_nodes=None, ranks_per_node=per_node)
    in_order = tuple(rank // per_node for rank in range(layout.world_size))
    if even is None or even.node_of_rank != in_order:
        raise PlacementError(
            f"task {task.name}: {layout.world_size} ranks on {nodes} nodes of up to {ranks_per_node} are not "
            "the same number on each in rank order; change the order or the sizes of the branches, or use "
            "sbatch launchers/three_branch.sh, which assigns ranks to nodes freely"
        )
    return nodes, per_node


def check(config: Config, arguments: argparse.Namespace) -> None:
    """Refuses what a task could not start with, as far as it can be known here: with --ssh models and data
    are somewhere else. Verifiers of one's own and packages are in the tasks' environment; a task asks for
    them when it starts.

    Raises:
        ValueError: with the setting and the remedy.
    """
    if arguments.ssh:
        validate(config, world_size=None, model=None)
        return
    with contextlib.chdir(arguments.workdir):
        if arguments.executor == "local":
            check_device(config)
            check_textfile(config.logging.prometheus)
        validate(config, world_size=None, model=read_model_shapes(config))
        for name in named_verifiers(config):
            refuse_unknown(name)
        check_files(config)


def ssh_target(text: str) -> tuple[str, str, int]:
    """User, host and port of ``user@host[:port]``.

    Raises:
        ValueError: ``text`` has another form.
    """
    match = re.fullmatch(r"(?P<user>[^@\s]+)@(?P<host>[^:\s]+)(:(?P<port>\d+))?", text)
    if match is None:
        raise ValueError(f"--ssh {text}: give user@host or user@host:port")
    return match["user"], match["host"], int(match["port"] or 22)


def _executor(arguments: argparse.Namespace, task: Task) -> Any:
    import nemo_run as run

    if arguments.executor == "local":
        return run.LocalExecutor()
    nodes, per_node = nodes_of(task, arguments.ranks_per_node)
    if arguments.ssh:
        user, host, port = ssh_target(arguments.ssh)
        tunnel = run.SSHTunnel(
            host=host, user=user, port=port, job_dir=arguments.job_dir, identity=arguments.identity
        )
    else:
        tunnel = run.LocalTunnel(job_dir="")  # in NEMORUN_HOME, beside the experiment
    gpus = {} if arguments.gpus_per_node == 0 else {"gpus_per_node": min(arguments.gpus_per_node, per_node)}
    executor = run.SlurmExecutor(
        account=arguments.account,
        partition=arguments.partition,
        time=arguments.time,
        nodes=nodes,
        ntasks_per_node=per_node,
        exclusive=None if task.evaluates else True,
        # to the ranks, not to the batch script: they save and exit with a status that gets the job requeued
        signal=f"USR1@{arguments.signal_seconds}",
        container_image=arguments.container_image,
        container_mounts=[f"{p}:{p}" for p in (arguments.project, arguments.workdir)],
        # the ranks exit one by one after a save; the first to exit must not end the others
        srun_args=["--kill-on-bad-exit=0"],
        packager=run.Packager(),
        tunnel=tunnel,
        # the address of rank 0's node, because the other nodes may be unable to resolve its name
        setup_lines='export MASTER_ADDR=$(scontrol --oneliner show node "$head_node" '
        "| sed -n 's/.* NodeAddr=\\([^ ]*\\).*/\\1/p')",
        poll_estimated_start_time=False,
        **gpus,
    )
    executor.retries = arguments.retries
    return executor


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="applied to every task")
    parser.add_argument(
        "--recipes", nargs="+", default=["copd"], help="files of copd_megatron/recipes/experiments"
    )
    parser.add_argument("--executor", choices=("local", "slurm"), default="local")
    parser.add_argument("--out", type=Path, help="folder for results, on the cluster's file system")
    parser.add_argument("--dry-run", action="store_true", help="show the tasks and start nothing")
    parser.add_argument("--project", type=Path, default=PROJECT, help="this project's folder on the cluster")
    parser.add_argument("--workdir", type=Path, help="where relative paths start; default: this folder")
    parser.add_argument("--requirements", choices=("cpu", "gpu"), help="default: cpu locally, gpu on SLURM")
    slurm = parser.add_argument_group("SLURM")
    slurm.add_argument("--account", default="root")
    slurm.add_argument("--partition")
    slurm.add_argument("--time", default="04:00:00", help="time limit of a job; the next one continues")
    slurm.add_argument("--ranks-per-node", type=int, default=8, help="ranks per node, usually its GPUs")
    slurm.add_argument("--gpus-per-node", type=int, default=8, help="0 for nodes without GPUs")
    slurm.add_argument("--signal-seconds", type=int, default=600, help="time reserved for saving")
    slurm.add_argument("--retries", type=int, default=20, help="requeues after time limits and failures")
    slurm.add_argument("--ssh", metavar="USER@HOST[:PORT]", help="login node; default: this machine")
    slurm.add_argument("--identity", help="key file for --ssh")
    slurm.add_argument("--job-dir", help="with --ssh: NeMo-Run's folder on the cluster")
    slurm.add_argument("--container-image", help="image for Pyxis; default: no container")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    arguments = _parser().parse_intermixed_args(argv)
    arguments.workdir = arguments.workdir or Path.cwd()
    try:
        if arguments.ssh and not (ssh_target(arguments.ssh) and arguments.job_dir):
            raise ValueError("--ssh needs --job-dir: NeMo-Run's folder on the cluster's file system")
        config = load_config(arguments.config, arguments.overrides)
        out = arguments.out or Path("runs") / f"{config.run.name}_experiment"
        out = arguments.workdir / out
        tasks = tasks_of(config, arguments.recipes, out)
        checked: list[Config] = []
        for task in tasks:
            if (settings := as_it_starts(task, config, tasks)) not in checked:
                check(settings, arguments)
                checked.append(settings)
            if arguments.executor == "slurm":
                nodes_of(task, arguments.ranks_per_node)
    except (ConfigError, PlacementError, ValueError) as error:
        print(f"nemo_experiment: {error}", file=sys.stderr)
        return 2
    requirements = arguments.requirements or ("gpu" if arguments.executor == "slurm" else "cpu")
    scripts = {
        task.name: script_of(
            task, project=arguments.project, workdir=arguments.workdir, out=out, requirements=requirements
        )
        for task in tasks
    }
    if arguments.dry_run:
        for task in tasks:
            print(f"# {task.name}, after {', '.join(task.after) or 'nothing'}\n{scripts[task.name]}")
        return 0
    return _run(arguments, tasks, scripts, title=out.name)


def _run(arguments: argparse.Namespace, tasks: Sequence[Task], scripts: dict[str, str], title: str) -> int:
    """Runs the experiment locally, or submits it to SLURM."""
    os.environ.setdefault("NEMORUN_HOME", str(Path.home() / ".nemo_run"))
    import nemo_run as run

    on_slurm = arguments.executor == "slurm"
    with run.Experiment(title) as experiment:
        ids: dict[str, str] = {}
        for task in tasks:
            ids[task.name] = experiment.add(
                run.Script(inline=scripts[task.name]),
                executor=_executor(arguments, task),
                name=task.name,
                dependencies=[ids[name] for name in task.after],
                tail_logs=not on_slurm,
            )
        experiment.run(detach=on_slurm)
        if on_slurm:
            return 0
    failed = {
        name: status["status"]
        for name, status in experiment.status(return_dict=True).items()
        if str(status["status"]) != "SUCCEEDED"
    }
    for name, status in failed.items():
        print(f"nemo_experiment: {name}: {status}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
