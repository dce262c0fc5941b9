"""The training loop: Algorithm 1 of the CoPD paper, run by every process for its own branch."""

from __future__ import annotations

import logging
from pathlib import Path

from copd_megatron.branch import Branch, start
from copd_megatron.checkpoint.stop import EXIT_PREEMPTED
from copd_megatron.config import Config
from copd_megatron.evaluate import Accuracies, each_branch, load_folder, shared_model, write_table
from copd_megatron.merge.mean import merge_mean
from copd_megatron.metrics.report import write_report
from copd_megatron.observe import Observer
from copd_megatron.resume import Checkpoints
from copd_megatron.schedule import Step, num_steps, steps
from copd_megatron.stages import cross_batch, native_batch, sync_weights, update
from copd_megatron.topology.layout import Layout
from copd_megatron.weight_sync.export import export_hf

logger = logging.getLogger(__name__)


def train(config: Config) -> int:
    """Runs what is left of the schedule and what follows it; called by every rank of the job.

    Returns:
        The process's exit status: 0, or ``EXIT_PREEMPTED`` if the run was saved and stopped before its end.
    """
    with (
        start(config, Layout.from_config(config)) as me,
        Observer(me) as observer,
        Checkpoints(me, observer) as checkpoints,
    ):
        progress = checkpoints.resume()
        sync_weights(me)
        if config.evaluation.at_start and me.validation and not progress.steps_done:
            progress.table |= shared_model(me, "base")
        for step in steps(config.schedule, progress.steps_done):
            observer.begin(step)
            batch = native_batch(me, step)  # sample, grade, GRPO advantages (Eq. 7, 11)
            batch.rows += cross_batch(
                me, step, batch.native
            )  # sample, teachers score, OPD advantages (Eq. 8)
            update(me, batch.rows, step)  # native and cross rows in one optimizer step
            sync_weights(me)  # Megatron -> vLLM, live
            accuracies = each_branch(me) if evaluation_due(config, step) else None
            if accuracies:
                observer.validation(accuracies)
            observer.step(step)
            if checkpoints.after(step, accuracies):
                return EXIT_PREEMPTED
        checkpoints.wait()
        finish(me, progress.table)
    return 0


def evaluation_due(config: Config, step: Step) -> bool:
    """Whether the branches are evaluated after this step."""
    every = config.evaluation.every_steps
    return bool(every) and (step.index + 1) % every == 0


def finish(me: Branch, table: Accuracies) -> None:
    """Exports every branch, merges them (theta = mean of the branches), evaluates, writes the table."""
    config, folder = me.config, me.run_dir / "export"
    if me.validation:
        table |= each_branch(me)
    trained = [name for name, branch in config.branches.items() if not branch.frozen]
    if config.end.export or config.end.merge:
        export_branch(me, folder / me.name)
        me.world.barrier("export")
    if config.end.merge and len(trained) > 1:
        merge_mean(
            [folder / name for name in trained],
            folder / "merged",
            rank=me.world.rank,
            world_size=me.world.world_size,
            barrier=lambda: me.world.barrier("merge"),
        )
        load_folder(me, folder / "merged")
        if me.validation:
            table |= shared_model(me, "merged")
    if table:
        text = write_table(me, table)
        if me.world.is_first:
            logger.info("validation accuracy of %s: see %s", ", ".join(table), me.run_dir / "evaluation.txt")
            # for the person who waits: lines of a log would be too wide to read
            print(f"\nvalidation accuracy (%)\n\n{text}\n", flush=True)
    if me.world.is_first and num_steps(config.schedule):
        behaviour, picture = write_report(me.run_dir)
        if behaviour:
            print(f"how alike the branches are\n\n{behaviour}\n", flush=True)
        print(f"curves: {picture}", flush=True)


def export_branch(me: Branch, folder: Path) -> None:
    """This branch's weights as a Hugging Face folder."""
    if not me.trains:
        return
    with me.world.watch.operation("export", ranks=me.world.branch_ranks[me.name]):
        export_hf(me.actor, folder, source=me.settings.model_path or me.config.model.path)
