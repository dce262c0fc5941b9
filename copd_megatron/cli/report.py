"""``copd report``."""

from __future__ import annotations

from pathlib import Path

import click

from copd_megatron.cli.group import Command
from copd_megatron.cli.parameters import PATH

EXAMPLES = """
    copd report runs/three_branch_tiny
"""


@click.command("report", cls=Command, examples=EXAMPLES)
@click.argument("run_dir", type=PATH)
def command(run_dir: Path) -> int:
    """Show how a run went.

    Prints the table of accuracies and how alike the branches are, and writes the curves to
    RUN_DIR/report.png. RUN_DIR is a run directory, during the run or after it.
    """
    from copd_megatron.report.curves import write_report

    behaviour, picture = write_report(run_dir)
    table = run_dir / "evaluation.txt"
    parts = [table.read_text(encoding="utf-8")] if table.is_file() else []
    print("\n".join([*parts, *([behaviour, ""] if behaviour else []), f"curves: {picture}"]))
    return 0
