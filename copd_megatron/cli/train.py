"""``copd train``."""

from __future__ import annotations

import os
import sys

import click

from copd_megatron.cli.group import Command
from copd_megatron.cli.output import say
from copd_megatron.cli.parameters import OVERRIDES
from copd_megatron.config import load_config, read_model_shapes, validate
from copd_megatron.launch.caches import usable_caches
from copd_megatron.launch.rank_process import take_one_interrupt
from copd_megatron.topology.slurm import step_environment

EXAMPLES = """
    copd train configs/three_branch_tiny.yaml --dry-run          check, print the resolved run, start nothing
    copd train configs/three_branch_tiny.yaml                    train on this machine
    copd train my.yaml schedule.cycles=4 optimizer.lr=2e-4       with settings changed
    copd train my.yaml run.overwrite=true                        start over what the run directory holds
    srun --ntasks=16 copd train my.yaml                          in a SLURM job, one task a rank
"""


@click.command("train", cls=Command, examples=EXAMPLES)
@click.argument("config")
@OVERRIDES
@click.option("--dry-run", is_flag=True, help="Check, print the resolved run, start nothing.")
def command(config: str, overrides: tuple[str, ...], dry_run: bool) -> int:
    """Train the branches of a configuration.

    CONFIG is a YAML file; KEY=VALUE replaces one of its settings, by its dotted name. The ranks are started
    with a local torchrun; under torchrun or srun this process becomes one of the ranks that are there.
    Started again with the same command, a run goes on from its newest valid checkpoint.
    """
    os.environ.update(step_environment(os.environ))
    if "RANK" in os.environ:
        take_one_interrupt()
    settings = load_config(config, overrides)
    world_size = int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ else None
    validate(settings, world_size=world_size, model=read_model_shapes(settings))
    from copd_megatron.launch.preflight import check_inputs, check_run, check_start, refusals_here

    if dry_run:
        from copd_megatron.launch.dry_run import dry_run as description

        say(description(settings, num_samples=check_run(settings, wait_seconds=0)))
        for reason in refusals_here(settings):
            say(f"copd: warning: on this machine the run would not start: {reason}", file=sys.stderr)
        return 0
    usable_caches()
    if world_size is None:
        from copd_megatron.launch.torchrun import become_torchrun

        check_start(settings)
        become_torchrun(settings, ["train", config, *overrides])

    from copd_megatron.launch.rank_process import die_with_launcher, log_as_rank

    die_with_launcher()
    log_as_rank(settings)
    check_inputs(settings)
    from copd_megatron.launch.waiting import waiting

    with waiting("importing Megatron and vLLM"):
        from copd_megatron.train import train

    return train(settings)
