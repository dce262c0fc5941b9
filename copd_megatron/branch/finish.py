"""What follows the last step: export, merge, evaluation, the table."""

from __future__ import annotations

import logging
from pathlib import Path

from copd_megatron.branch.merged import MERGED, export_branch, merge_branches
from copd_megatron.branch.schedule import num_steps
from copd_megatron.branch.state import Branch
from copd_megatron.branch.validation import each_branch, load_folder, shared_model, write_table
from copd_megatron.evaluation.run import Accuracies
from copd_megatron.evaluation.table import table_title
from copd_megatron.launch.results import EXPORT, begin_exports, end_exports, export_names
from copd_megatron.report.curves import write_report
from copd_megatron.report.page import write_page
from copd_megatron.untrusted.visible import visible

logger = logging.getLogger(__name__)


def finish(me: Branch, table: Accuracies) -> Accuracies:
    """Exports every branch, merges them (theta = mean of the branches), evaluates, writes the table.

    Args:
        table: rows that are known already.

    Returns:
        All rows.
    """
    config, folder = me.config, me.run_dir / EXPORT
    if me.validation:
        table = table | each_branch(me)
    names = export_names(config)
    if names:
        if me.world.is_first:
            begin_exports(me.run_dir, names, num_steps(config.schedule))
        me.world.barrier("exports noted")
        export_branch(me, folder / me.name)
        me.world.barrier("export")
    merged = merge_branches(me, folder) if MERGED in names else None
    if names and me.world.is_first:
        end_exports(me.run_dir, names)
    if merged is not None:
        load_folder(me, merged)
        if me.validation:
            table = table | shared_model(me, MERGED)
    if table:
        text = write_table(me, table)
        if me.world.is_first:
            logger.info("validation accuracy of %s: see %s", ", ".join(table), me.run_dir / "evaluation.txt")
            # for the person who waits: lines of a log would be too wide to read
            print(visible(f"\n{table_title(table)}\n\n{text}\n"), flush=True)
    if me.world.is_first and num_steps(config.schedule):
        behaviour, picture = write_report(me.run_dir)
        if behaviour:
            print(visible(f"how alike the branches are\n\n{behaviour}\n"), flush=True)
        print(visible(f"curves: {picture}"), flush=True)
        _write_page(me.run_dir)
    return table


def _write_page(run_dir: Path) -> None:
    """The page to read and to send. What it cannot show, a damaged file of samples for example, does not make
    a finished run fail."""
    try:
        page = write_page([run_dir], run_dir / "report.html")
    except (OSError, ValueError) as error:
        logger.warning("no page: %s; copd report %s writes it", error, run_dir)
    else:
        print(visible(f"page: {page}"), flush=True)
