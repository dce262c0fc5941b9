"""``copd logs``."""

from __future__ import annotations

from pathlib import Path

import click

from copd_megatron.cli.group import Command
from copd_megatron.cli.output import reader_may_leave, say
from copd_megatron.cli.parameters import COUNT_OR_NONE, PATH
from copd_megatron.metrics.rank_log import Selection, check_selection, follow, merged

EXAMPLES = """
    copd logs runs/three_branch_tiny                     everything, in order of time
    copd logs runs/three_branch_tiny --level ERROR       why a run ended
    copd logs runs/three_branch_tiny --branch image --follow
"""


@click.command("logs", cls=Command, examples=EXAMPLES)
@click.argument("run_dir", type=PATH)
@click.option("--branch", help="Only the ranks of this branch.")
@click.option("--rank", type=COUNT_OR_NONE, help="Only this global rank.")
@click.option(
    "--level",
    type=click.Choice(["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"], case_sensitive=False),
    help="Only this level and worse.",
)
@click.option(
    "--follow", "follows", is_flag=True, help="Go on with what is written from now on, until Ctrl-C."
)
def command(run_dir: Path, branch: str | None, rank: int | None, level: str | None, follows: bool) -> int:
    """Show the logs of all ranks as one.

    The lines are in order of time. RUN_DIR is a run directory, during the run or after it.
    """
    selection = Selection(branch=branch, rank=rank, level=level)
    check_selection(run_dir, selection)
    with reader_may_leave():
        for line in (follow if follows else merged)(run_dir, selection):
            say(line, flush=follows)
    return 0
