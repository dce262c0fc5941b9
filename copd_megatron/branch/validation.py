"""Evaluation inside a run: the branches' own weights, a model that all of them hold, and the final table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from copd_megatron.branch.sampling import sample_graded
from copd_megatron.branch.state import Branch
from copd_megatron.evaluation.run import Accuracies, accuracy, num_prompts
from copd_megatron.evaluation.table import Score, render_table, save_table
from copd_megatron.hf.folder import HFFolder
from copd_megatron.records import Prompt, Rollout
from copd_megatron.rollout.engine import SamplingSettings


def shared_model(me: Branch, name: str) -> Accuracies:
    """Accuracy of one model that every training branch holds: the work is split, domain by domain."""
    trainers = [branch for branch in me.world.branches if not me.config.branches[branch].frozen]
    mine = [d for i, d in enumerate(me.validation) if trainers[i % len(trainers)] == me.name]
    merged: dict[str, Score] = {}
    for part in me.world.all_gather_objects(_accuracy(me, mine), "evaluate.gather"):
        merged.update(part)
    return {name: merged}


def each_branch(me: Branch) -> Accuracies:
    """Accuracy of every training branch's own model on every domain."""
    own = (me.name, _accuracy(me, me.validation))
    gathered = dict(me.world.all_gather_objects(own, "evaluate.gather"))
    return {branch: gathered[branch] for branch in me.world.branches if gathered[branch]}


def _accuracy(me: Branch, domains: Iterable[str]) -> dict[str, Score]:
    """Mean verifier score per domain under the weights that this branch's engine holds."""
    if me.engine is None:
        return {}

    def sample(prompts: Sequence[Prompt], settings: SamplingSettings, purpose: str) -> list[Rollout]:
        return sample_graded(me, prompts, settings, step=0, purpose=purpose)

    scores = accuracy(sample, me.validation, me.config.evaluation, domains=domains)
    # a resumed run has not evaluated: the next step must not find these prompts in the cache
    me.engine.llm.reset_prefix_cache()
    return scores


def load_folder(me: Branch, folder: str | Path) -> None:
    """Puts a Hugging Face folder's weights into the engine (version -1: not the actor's)."""
    if me.engine is not None:
        with me.world.watch.operation(f"rollout.load {Path(folder).name}"):
            me.engine.load_weights(HFFolder(folder).iterate(), version=-1)


def write_table(me: Branch, rows: Accuracies) -> str:
    """Saves the table in the run directory and returns it as text."""
    counts = num_prompts(me.validation)
    if me.world.is_first:
        save_table(me.run_dir, rows, list(me.validation), num_prompts=counts)
    return render_table(rows, list(me.validation), num_prompts=counts)
