"""``copd timeline``."""

from __future__ import annotations

from pathlib import Path

import click

from copd_megatron.cli.group import Command
from copd_megatron.cli.output import refuse_other, say
from copd_megatron.cli.parameters import PATH, step_range
from copd_megatron.metrics.timeline import BEGIN, write_trace

EXAMPLES = """
    copd train my.yaml profiling.timeline=true       record it
    copd timeline runs/my                            then open runs/my/timeline/trace.json at ui.perfetto.dev
    copd timeline runs/my --steps 3-5 --out steps.json
"""


@click.command("timeline", cls=Command, examples=EXAMPLES)
@click.argument("run_dir", type=PATH)
@click.option("--steps", metavar="A-B", help="Only these steps; the first one is 1.")
@click.option("--out", type=PATH, help="Default: RUN_DIR/timeline/trace.json.")
def command(run_dir: Path, steps: str | None, out: Path | None) -> int:
    """Show what every rank did when, and who waited.

    Prints a table and writes one Chrome trace for all ranks. RUN_DIR is the directory of a run with
    profiling.timeline=true, during the run or after it.
    """
    if out is not None:
        refuse_other(out, BEGIN, "trace of copd timeline")
    path, summary = write_trace(
        run_dir, out, steps=step_range("--steps", steps) if steps is not None else None
    )
    say(f"{summary}\nwrote {path}; open it at https://ui.perfetto.dev or chrome://tracing")
    return 0
