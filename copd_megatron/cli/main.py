"""The ``copd`` command: train, eval, merge, report, logs, timeline, doctor."""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import re
import shutil
import signal
import sys
import uuid
import warnings
from collections.abc import Sequence
from pathlib import Path

from copd_megatron.config import Config, ConfigError, load_config, read_model_shapes, validate
from copd_megatron.launch import preflight
from copd_megatron.launch.run_dir import run_directory, starts_anew
from copd_megatron.merge import command as merge_command
from copd_megatron.metrics.packages import check_packages
from copd_megatron.topology.slurm import step_environment


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script. Returns the exit status."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse leaves key=value behind an option unread
    if rest and hasattr(arguments, "overrides") and all(re.match(r"[^-=]+=", word) for word in rest):
        arguments.overrides += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        status: int = arguments.run(arguments)
    except (ConfigError, FileNotFoundError, ValueError) as error:
        # a rank of a running job gives its whole traceback; a person at a prompt wants the message
        if "RANK" in os.environ or os.environ.get("COPD_TRACEBACK"):
            raise
        print(f"copd: {error}", file=sys.stderr)
        return 2
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="copd", description="Co-evolving policy distillation on Megatron-Core."
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    train = commands.add_parser("train", help="train the branches of a configuration")
    train.add_argument("config", help="YAML file")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides")
    train.add_argument("--dry-run", action="store_true", help="check, print the resolved run, start nothing")
    train.set_defaults(run=_train)

    evaluate = commands.add_parser("eval", help="validation accuracy of a Hugging Face folder")
    evaluate.add_argument("config", help="YAML file whose validation sets and verifiers are used")
    evaluate.add_argument(
        "model", help="Hugging Face folder, an exported branch or merged model for instance"
    )
    evaluate.add_argument("overrides", nargs="*", metavar="key=value")
    evaluate.set_defaults(run=_eval)

    merge = commands.add_parser("merge", help="merge branches: mean, task arithmetic, TIES, DARE, slerp")
    merge_command.add_arguments(merge)
    merge.set_defaults(run=merge_command.run)

    report = commands.add_parser("report", help="a run's table, how alike its branches are, and its curves")
    report.add_argument("run_dir", help="run directory, while or after it runs")
    report.set_defaults(run=_report)

    logs = commands.add_parser("logs", help="the logs of all ranks of a run as one, in the order of time")
    logs.add_argument("run_dir")
    logs.add_argument("--branch")
    logs.add_argument("--rank", type=int, help="global rank")
    logs.add_argument(
        "--level", choices=["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"], help="this one and worse"
    )
    logs.add_argument("--follow", action="store_true", help="go on with what is written from now on")
    logs.set_defaults(run=_logs)

    timeline = commands.add_parser(
        "timeline", help="what every rank did when (profiling.timeline=true), as one Chrome trace"
    )
    timeline.add_argument("run_dir")
    timeline.add_argument("--steps", metavar="A-B", help="only these steps; 1 is the first")
    timeline.add_argument("--out", type=Path, help="default: <run_dir>/timeline/trace.json")
    timeline.set_defaults(run=_timeline)

    doctor = commands.add_parser("doctor", help="what this machine has and what that enables")
    doctor.add_argument("--json", action="store_true")
    doctor.set_defaults(run=_doctor)
    return parser


def _report(arguments: argparse.Namespace) -> int:
    from copd_megatron.report.curves import write_report

    behaviour, picture = write_report(arguments.run_dir)
    table = Path(arguments.run_dir) / "evaluation.txt"
    parts = [table.read_text(encoding="utf-8")] if table.is_file() else []
    print("\n".join([*parts, *([behaviour, ""] if behaviour else []), f"curves: {picture}"]))
    return 0


def _train(arguments: argparse.Namespace) -> int:
    os.environ.update(step_environment(os.environ))
    config = load_config(arguments.config, arguments.overrides)
    world_size = int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ else None
    validate(config, world_size=world_size, model=read_model_shapes(config))
    if arguments.dry_run:
        from copd_megatron.launch.dry_run import dry_run

        print(dry_run(config))
        return 0
    _check_inputs(config)
    if world_size is None:
        return _torchrun(config, ["train", arguments.config, *arguments.overrides])
    _logging(config)
    _end_with_launcher()
    from copd_megatron.train import train

    return train(config)


def _check_inputs(config: Config) -> None:
    """Packages, data, verifiers and the run directory, before any process is started."""
    check_packages(config.logging)
    from copd_megatron.data import check_shards
    from copd_megatron.rewards import registry

    for branch in config.branches.values():
        registry.resolve(branch.reward.verifiers)
        for patterns in (branch.data.train, branch.data.validation):
            if patterns:
                check_shards(patterns, branch.reward.verifiers)
    folder = run_directory(config)
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        total = sum(branch.parallel.world_size for branch in config.branches.values())
        preflight.check_shared_memory(preflight.local_ranks(total))
    if int(os.environ.get("RANK", "0")) == 0:
        _check_run_dir(config, folder)
        preflight.check_disk(config, read_model_shapes(config), folder)


def _check_run_dir(config: Config, folder: Path) -> None:
    """Whether the run directory is free, or holds a run that this configuration can continue."""
    from copd_megatron.checkpoint.compatible import check_compatible
    from copd_megatron.checkpoint.manifest import checkpoints_dir, complete_checkpoints, step_folder
    from copd_megatron.launch.lock import RunLock

    with RunLock(folder):  # refused, or free: the job's first rank takes it for good
        pass
    metrics = folder / "metrics.jsonl"
    if starts_anew(config):
        metrics.unlink(missing_ok=True)
        shutil.rmtree(checkpoints_dir(folder), ignore_errors=True)
        return
    if found := complete_checkpoints(folder):
        step, manifest = next(iter(found.items()))
        check_compatible(manifest.config, config, where=str(step_folder(folder, step)))
        return
    # a run that was killed before its first save was complete (in the background: before the second was due)
    # has lost nothing that starting over does not bring back
    steps_done = len(metrics.read_bytes().splitlines()) if metrics.exists() else 0
    if steps_done > 2 * config.checkpoint.save_period:
        raise ConfigError(
            f"run.dir: {folder} already holds a run of {steps_done} steps, without a checkpoint to continue "
            "from; choose another run.name or run.dir, or set run.overwrite=true"
        )


def _torchrun(config: Config, arguments: Sequence[str]) -> int:
    """Replaces this process by a local torchrun of as many ranks as the branches need."""
    ranks = sum(branch.parallel.world_size for branch in config.branches.values())
    environment = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks)),
        # after a signal the ranks get the time to save
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(max(30, int(config.checkpoint.save_before_seconds))),
    }
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    os.environ["COPD_MAX_RESTARTS"] = str(config.run.max_restarts)
    os.environ["COPD_RUN_ID"] = uuid.uuid4().hex[:12]
    command = [sys.executable, "-m", "copd_megatron.launch.local", str(run_directory(config))]
    # torchrun would give the ranks this machine's name as address, which need not resolve (containers)
    command += ["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={ranks}"]
    command += [
        "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
        "-m",
        "copd_megatron.cli",
        *arguments,
    ]
    sys.stdout.flush()
    os.execv(sys.executable, command)


def _end_with_launcher() -> None:
    """Under torchrun, this rank is killed when its launcher dies: ranks left over would go on writing to a
    run directory that a restarted job writes to as well."""
    if sys.platform != "linux" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    parent_death_signal = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL)


def _logging(config: Config) -> None:
    """Log lines carry branch and rank; on the console ranks other than 0 speak up only when something is
    wrong."""
    from copd_megatron.metrics.rank_log import RankPlace, start_logging
    from copd_megatron.topology.layout import Layout

    rank, layout = int(os.environ.get("RANK", "0")), Layout.from_config(config)
    branch = layout.branch_of(rank)
    ranks = layout.ranks_of(branch)
    start_logging(
        RankPlace(rank=rank, branch=branch, branch_rank=ranks.index(rank), branch_size=len(ranks)),
        config.logging.level,
        folder=run_directory(config) if config.logging.rank_files else None,
        append=not starts_anew(config),
    )
    # what the libraries say about kernels this machine lacks is `copd doctor`'s to tell, once
    for library in ("megatron", "torch.utils.cpp_extension"):
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
    warnings.filterwarnings("ignore", category=SyntaxWarning)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def _eval(arguments: argparse.Namespace) -> int:
    from copd_megatron.evaluation.folder import evaluate_folder

    print(evaluate_folder(load_config(arguments.config, arguments.overrides), arguments.model))
    return 0


def _logs(arguments: argparse.Namespace) -> int:
    from copd_megatron.metrics.rank_log import Selection, follow, merged

    selection = Selection(branch=arguments.branch, rank=arguments.rank, level=arguments.level)
    try:
        for line in (follow if arguments.follow else merged)(Path(arguments.run_dir), selection):
            print(line, flush=arguments.follow)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, head for one, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _timeline(arguments: argparse.Namespace) -> int:
    from copd_megatron.metrics.timeline import write_trace

    steps = None
    if arguments.steps is not None:
        first, _, last = arguments.steps.partition("-")
        try:
            steps = int(first), int(last or first)
        except ValueError as error:
            raise ConfigError(f"--steps {arguments.steps}: write 3, or 3-5") from error
    path, summary = write_trace(Path(arguments.run_dir), arguments.out, steps=steps)
    print(f"{summary}\nwrote {path}; open it at https://ui.perfetto.dev or chrome://tracing")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from copd_megatron.launch import doctor

    report = doctor.report()
    print(report.to_json() if arguments.json else report.to_text())
    return 0
