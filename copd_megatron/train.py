"""The training loop: Algorithm 1 of the CoPD paper, run by every process for its own branch."""

from __future__ import annotations

from copd_megatron.branch.checkpoints import Checkpoints
from copd_megatron.branch.finish import finish
from copd_megatron.branch.merged import mean_as_it_is
from copd_megatron.branch.observer import Observer
from copd_megatron.branch.schedule import Step, steps
from copd_megatron.branch.start import start
from copd_megatron.branch.state import Batch
from copd_megatron.branch.update import sync_weights
from copd_megatron.branch.validation import each_branch, starting_models
from copd_megatron.checkpoint.stop import EXIT_PREEMPTED
from copd_megatron.config import Config
from copd_megatron.plugins import RECIPES
from copd_megatron.recipes.base import Recipe
from copd_megatron.topology.layout import Layout


def train(config: Config) -> int:
    """Runs the rest of the schedule, then exports, merges and evaluates. Every rank of the job calls it.

    Returns:
        The exit status of the process: 0, or ``EXIT_PREEMPTED`` if the run saved and stopped before its end.
    """
    recipe: Recipe = RECIPES.load(config.recipe, "recipe")
    recipe.check(config)
    with (
        start(config, Layout.from_config(config)) as me,
        Observer(me) as observer,
        Checkpoints(me, observer) as checkpoints,
    ):
        progress = checkpoints.resume()
        sync_weights(me)
        if config.evaluation.at_start and me.validation and not progress.table:
            progress.table = starting_models(me, trained=bool(progress.steps_done))
        for step in steps(config.schedule, progress.steps_done):
            observer.begin(step)
            batch = Batch()
            for stage in recipe.stages:  # CoPD: answer, native, cross, update, sync
                batch = stage(me, step, batch)
            accuracies = each_branch(me) if evaluation_due(config, step) else None
            if accuracies:
                observer.validation(accuracies)
            if accuracies and config.evaluation.merged:
                observer.merged(mean_as_it_is(me))
            alone = len(config.branches) > 1 and not recipe.in_step(config, step)
            observer.step(step, alone=alone)
            if checkpoints.after(step, accuracies, alone=alone):
                return EXIT_PREEMPTED
        checkpoints.wait()
        observer.catch_up()
        observer.final(finish(me, progress.table))
    return 0


def evaluation_due(config: Config, step: Step) -> bool:
    """Whether the branches are evaluated after this step."""
    every = config.evaluation.every_steps
    return bool(every) and (step.index + 1) % every == 0
