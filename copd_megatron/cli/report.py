"""``copd report``."""

from __future__ import annotations

import time
from pathlib import Path

import click

from copd_megatron.cli.group import Command
from copd_megatron.cli.output import refuse_other, say
from copd_megatron.cli.parameters import COUNT, COUNT_OR_NONE, PATH
from copd_megatron.untrusted.whole_file import write_whole

EXAMPLES = """
    copd report runs/three_branch_tiny                   writes report.html and report.png there
    copd report runs/seed1 runs/seed2 runs/seed3 --out seeds.html
    copd report runs/three_branch_tiny --follow 30       keeps the page fresh while the run goes on
"""


@click.command("report", cls=Command, examples=EXAMPLES)
@click.argument("run_dirs", nargs=-1, required=True, type=PATH, metavar="RUN_DIR...")
@click.option("--out", type=PATH, help="The page; default: RUN_DIR/report.html, of the first run.")
@click.option(
    "--samples",
    "num_samples",
    type=COUNT_OR_NONE,
    default=24,
    show_default=True,
    help="Responses on the page.",
)
@click.option("--distances", is_flag=True, help="Also how far each branch moved; reads all exported models.")
@click.option("--follow", type=COUNT, metavar="SECONDS", help="Write the page again so often, until Ctrl-C.")
def command(
    run_dirs: tuple[Path, ...], out: Path | None, num_samples: int, distances: bool, follow: int | None
) -> int:
    """Show how runs went.

    Writes one self-contained HTML page: accuracies with intervals, curves, where the time went, responses
    with tokens coloured by the teacher, settings. Of several runs it shows means with bands and the gain over
    the base, run by run. Of a single run it also prints the table and how alike the branches are, and draws
    RUN_DIR/report.png. RUN_DIR is a run directory, during the run or after it.
    """
    from copd_megatron.report.curves import write_report
    from copd_megatron.report.history import read_run
    from copd_megatron.report.page import BEGIN, PageOptions, read_shown, refuse_twice, write_page

    refuse_twice(run_dirs)
    target = out or run_dirs[0] / "report.html"
    if out is not None:
        refuse_other(out, BEGIN, "page of copd report")
    if distances:
        for run_dir in run_dirs:
            _measure(run_dir)
    parts = []
    if len(run_dirs) == 1:
        behaviour, picture = write_report(run_dirs[0])
        table = read_shown(run_dirs[0] / "evaluation.txt")
        gone_on = read_run(run_dirs[0]).gone_on
        parts = [*([table] if table else []), *([f"{gone_on}\n"] if gone_on else [])]
        parts += [*([behaviour, ""] if behaviour else []), f"curves: {picture}"]
    options = PageOptions(num_samples=num_samples, refresh_seconds=follow)
    write_page(run_dirs, target, options)
    if len(run_dirs) > 1:
        parts.append(f"means of {len(run_dirs)} runs; the page says where one has fewer points or prompts")
    say("\n".join([*parts, f"page: {target}"]), flush=True)
    while follow is not None:
        time.sleep(follow)
        write_page(run_dirs, target, options)
    return 0


def _measure(run_dir: Path) -> None:
    """Writes ``distances.json`` of a run's exported branches against its base."""
    from copd_megatron.config import load_config
    from copd_megatron.report.merge_distance import branch_distances

    config = load_config(run_dir / "config.yaml")
    folders = [run_dir / "export" / name for name, branch in config.branches.items() if not branch.frozen]
    report = branch_distances(config.model.path, folders)
    write_whole(run_dir / "distances.json", report.to_json() + "\n")
