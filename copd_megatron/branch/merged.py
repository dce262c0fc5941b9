"""The mean of the branches: merged from their exports, at the end of a run or as they are in between."""

from __future__ import annotations

import shutil
from pathlib import Path

from copd_megatron.branch.live_mean import load_live_mean
from copd_megatron.branch.state import Branch
from copd_megatron.branch.update import sync_weights
from copd_megatron.branch.validation import beside_the_step, load_folder, shared_model
from copd_megatron.evaluation.run import Accuracies
from copd_megatron.launch.results import MEAN, MERGED
from copd_megatron.merge.mean import merge_mean
from copd_megatron.weight_sync.export import export_hf


def trained_branches(me: Branch) -> list[str]:
    """The branches that are merged."""
    return [name for name, branch in me.config.branches.items() if not branch.frozen]


def export_branch(me: Branch, folder: Path) -> None:
    """This branch's weights as a Hugging Face folder."""
    if not me.trains:
        return
    with me.world.watch.operation("export", ranks=me.world.branch_ranks[me.name]):
        export_hf(me.actor, folder, source=me.settings.model_path or me.config.model.path)


def merge_branches(me: Branch, folder: Path) -> Path:
    """Writes the mean of the branches' exports in ``folder``; returns its folder. Collective over all
    branches."""
    target = folder / MERGED
    merge_mean(
        [folder / name for name in trained_branches(me)],
        target,
        rank=me.world.rank,
        world_size=me.world.world_size,
        barrier=lambda: me.world.barrier("merge"),
    )
    return target


def mean_as_it_is(me: Branch) -> Accuracies:
    """Accuracy of the mean of the branches with their present weights: what a user would get of the run now.
    Collective over all branches, whose engines have their own weights again afterwards.

    The mean goes from actors to engines directly; where the branches' layouts do not allow that, it takes a
    detour over the run directory, where nothing is left of it. Empty with a single trained branch, which has
    no other to be merged with.
    """
    branches = trained_branches(me)
    if len(branches) < 2:
        return {}
    folder = me.run_dir / MEAN
    with beside_the_step(me):
        live = load_live_mean(me, branches)
        if not live:
            export_branch(me, folder / me.name)
            me.world.barrier("export")
            load_folder(me, merge_branches(me, folder))
    rows = shared_model(me, MERGED)
    with beside_the_step(me):
        sync_weights(me)
        me.world.barrier("mean evaluated")
        if me.world.is_first and not live:
            shutil.rmtree(folder)
    return rows
