"""The ``copd`` command: train, merge, eval, report, doctor."""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import shutil
import signal
import sys
import uuid
import warnings
from collections.abc import Sequence
from pathlib import Path

from copd_megatron import preflight
from copd_megatron.config import Config, ConfigError, load_config, read_model_shapes, validate
from copd_megatron.merge import command as merge_command
from copd_megatron.topology.slurm import step_environment


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script. Returns the exit status."""
    arguments = _parser().parse_args(argv)
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

    doctor = commands.add_parser("doctor", help="what this machine has and what that enables")
    doctor.add_argument("--json", action="store_true")
    doctor.set_defaults(run=_doctor)
    return parser


def _report(arguments: argparse.Namespace) -> int:
    from copd_megatron.metrics.report import write_report

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
        from copd_megatron.dry_run import dry_run

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
    """Data, verifiers and the run directory, before any process is started."""
    from copd_megatron.data import check_shards
    from copd_megatron.rewards import registry

    for branch in config.branches.values():
        registry.resolve(branch.reward.verifiers)
        for patterns in (branch.data.train, branch.data.validation):
            if patterns:
                check_shards(patterns, branch.reward.verifiers)
    folder = Path(config.run.dir or f"runs/{config.run.name}")
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

    metrics = folder / "metrics.jsonl"
    launchers = ("TORCHELASTIC", "SLURM", "COPD")
    restarted = any(os.environ.get(f"{launcher}_RESTART_COUNT", "0") != "0" for launcher in launchers)
    if config.run.overwrite and not restarted:
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
    run_dir = config.run.dir or f"runs/{config.run.name}"
    command = [sys.executable, "-m", "copd_megatron.local_launch", run_dir]
    command += ["--standalone", f"--nproc-per-node={ranks}"]
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
    """Log lines carry the rank; ranks other than 0 speak up only when something is wrong."""
    rank = int(os.environ.get("RANK", "0"))
    level = logging.getLevelName(config.logging.level) if rank == 0 else logging.WARNING
    logging.basicConfig(
        level=level, format=f"%(asctime)s rank {rank} %(name)s: %(message)s", stream=sys.stderr
    )
    # what the libraries say about kernels this machine lacks is `copd doctor`'s to tell, once
    for library in ("megatron", "torch.utils.cpp_extension"):
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
    warnings.filterwarnings("ignore", category=SyntaxWarning)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def _eval(arguments: argparse.Namespace) -> int:
    from copd_megatron.evaluate_folder import evaluate_folder

    print(evaluate_folder(load_config(arguments.config, arguments.overrides), arguments.model))
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from copd_megatron import doctor

    report = doctor.report()
    print(report.to_json() if arguments.json else report.to_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
