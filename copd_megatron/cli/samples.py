"""``copd samples``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from copd_megatron.cli.group import Command
from copd_megatron.cli.output import reader_may_leave
from copd_megatron.cli.parameters import COUNT, PATH, step_range

EXAMPLES = """
    copd samples runs/three_branch_tiny                      the newest responses
    copd samples runs/three_branch_tiny --branch image --wrong --steps 1-5
    copd samples runs/three_branch_tiny --edge 'text<-image' --prompt 'How many'
    copd samples runs/three_branch_tiny --json --limit 1000 | jq .reward
"""


@click.command("samples", cls=Command, examples=EXAMPLES)
@click.argument("run_dir", type=PATH)
@click.option("--step", "--steps", "steps", metavar="A[-B]", help="Only these steps; the first one is 1.")
@click.option("--branch", help="Only what this branch sampled.")
@click.option(
    "--kind",
    type=click.Choice(["native", "cross", "validation"]),
    help="Only training on own prompts, on an edge's, or evaluations.",
)
@click.option("--edge", metavar="STUDENT<-TEACHER", help="Only responses that this edge's teacher scored.")
@click.option("--wrong", "verdict", flag_value="wrong", help="Only rewards of 0 or less.")
@click.option("--right", "verdict", flag_value="right", help="Only rewards of 1 or more.")
@click.option("--prompt", "text", help="Only prompts with this text, in any case, in them or in their ids.")
@click.option("--limit", type=COUNT, default=10, show_default=True, help="Show the newest so many.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, with all that is kept.")
def command(
    run_dir: Path,
    steps: str | None,
    kind: str | None,
    verdict: str | None,
    limit: int,
    as_json: bool,
    **wanted: Any,
) -> int:
    """Show what the models answered.

    A few responses of each step and evaluation, with prompt, gold answer, verdict and reward; tokens coloured
    by the teacher's log-ratio. RUN_DIR is a run directory, during the run or after it.
    """
    from collections import deque

    from copd_megatron.samples.files import Selection, read_samples
    from copd_megatron.samples.record import Kind, Verdict, to_line
    from copd_megatron.untrusted.visible import visible_json

    selection = Selection(
        steps=None if steps is None else step_range("--step", steps),
        kind=None if kind is None else Kind(kind),
        verdict=None if verdict is None else Verdict(verdict),
        **wanted,
    )
    newest = deque(read_samples(run_dir, selection), maxlen=limit)
    if not newest:
        raise click.ClickException(f"{run_dir}: no sample is like that; leave out some of the options")
    with reader_may_leave():
        if as_json:
            for sample in newest:
                print(visible_json(to_line(sample)))
        else:
            _show(newest)
    return 0


def _show(samples: Any) -> None:
    from rich.console import Console

    from copd_megatron.samples.show import LEGEND, shown

    console = Console(highlight=False)
    for sample in samples:
        for paragraph in shown(sample):
            console.print(paragraph)
        console.print()
    if any(sample.teacher is not None for sample in samples):
        console.print(LEGEND, style="dim")
