"""Evaluation inside a run: the branches' own weights, a model that all of them hold, and the final table."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from copd_megatron.branch.sampling import sample_graded
from copd_megatron.branch.schedule import num_steps
from copd_megatron.branch.state import Branch
from copd_megatron.branch.update import sync_weights
from copd_megatron.evaluation.run import Accuracies, accuracy, num_prompts, sampling_settings, solved
from copd_megatron.evaluation.table import Score, render_table, save_table
from copd_megatron.hf.folder import HFFolder
from copd_megatron.launch.waiting import Countdown
from copd_megatron.metrics.reduction import Metrics
from copd_megatron.records import Prompt, Rollout
from copd_megatron.rewards.registry import own_digests
from copd_megatron.rollout.engine import SamplingSettings


def shared_model(me: Branch, name: str) -> Accuracies:
    """Accuracy of one model that every training branch holds: the work is split, domain by domain."""
    trainers = [branch for branch in me.world.branches if not me.config.branches[branch].frozen]
    mine = [d for i, d in enumerate(me.validation) if trainers[i % len(trainers)] == me.name]
    merged: dict[str, Score] = {}
    for part in me.world.all_gather_objects(_accuracy(me, name, mine), "evaluate.gather"):
        merged.update(part)
    return {name: merged}


def starting_models(me: Branch, *, trained: bool) -> Accuracies:
    """Accuracy of the models that the branches start from, a row for each: ``base`` for ``model.path``, and
    ``base of image`` for a ``model_path`` that branch image has of its own. The work on a model is split,
    domain by domain, over the branches that start from it.

    Args:
        trained: the branches have been trained already, so that the engines have to load their starting
            models for this.
    """
    models = _starting_models(me)
    name, holders = next(((row, names) for row, names in models.items() if me.name in names), ("", ()))
    if trained and holders:
        load_folder(me, me.settings.model_path or me.config.model.path)
    mine = [d for i, d in enumerate(me.validation) if holders and holders[i % len(holders)] == me.name]
    rows: Accuracies = {row: {} for row in models}
    for row, scores in me.world.all_gather_objects((name, _accuracy(me, name, mine)), "evaluate.gather"):
        rows.get(row, {}).update(scores)
    if trained:
        sync_weights(me)
    return {row: {d: scores[d] for d in me.validation if d in scores} for row, scores in rows.items()}


def _starting_models(me: Branch) -> dict[str, tuple[str, ...]]:
    """The row of each starting model, and the branches that train from it."""
    folders: dict[str, list[str]] = {}
    for name, branch in me.config.branches.items():
        if not branch.frozen:
            folders.setdefault(branch.model_path or me.config.model.path, []).append(name)
    return {
        "base" if folder == me.config.model.path else f"base of {', '.join(names)}": tuple(names)
        for folder, names in folders.items()
    }


def conditions(me: Branch) -> str:
    """A digest of what a figure of the table depends on besides the model: the prompts of every domain with
    all that verifiers are given, how they are sampled and computed, and the verifiers of the user's own. Rows
    that were measured under other conditions cannot be compared."""
    digest = hashlib.sha256()
    config = me.config
    engines = {
        name: (branch.rollout.quantization.value, branch.reward.timeout_seconds)
        for name, branch in config.branches.items()
    }
    settings = (config.model.dtype, config.model.max_sequence_tokens, asdict(config.media), engines)
    verifiers = {prompt.verifier for prompts in me.validation.values() for prompt in prompts}
    digest.update(repr((settings, sorted(own_digests(verifiers).items()))).encode())
    for domain, prompts in me.validation.items():
        digest.update(repr(sampling_settings(me.config, domain)).encode())
        for prompt in prompts:
            given = json.dumps(dict(prompt.metadata), sort_keys=True, default=repr, allow_nan=False)
            hashes = [medium.content_hash for medium in prompt.media]
            told = (domain, prompt.prompt_id, prompt.answer, prompt.verifier, given, hashes)
            digest.update(repr(told).encode("utf-8", "backslashreplace"))
            digest.update(prompt.token_ids.tobytes())
    return digest.hexdigest()


def each_branch(me: Branch) -> Accuracies:
    """Accuracy of every training branch's own model on every domain."""
    own = (me.name, _accuracy(me, me.name, me.validation))
    gathered = dict(me.world.all_gather_objects(own, "evaluate.gather"))
    return {branch: gathered[branch] for branch in me.world.branches if gathered[branch]}


def _accuracy(me: Branch, model: str, domains: Iterable[str]) -> dict[str, Score]:
    """Mean verifier score per domain under the weights that this branch's engine holds.

    ``model``: what these weights are called.
    """
    engine = me.engine
    if engine is None:
        return {}
    answers: dict[str, list[Rollout]] = {}

    def sample(prompts: Sequence[Prompt], settings: SamplingSettings, purpose: str) -> list[Rollout]:
        domain = purpose.removeprefix("validation/")
        share = len(prompts) * settings.num_generations // engine.num_replicas
        told = Countdown(f"evaluating {model} on {domain}", share)
        rollouts = sample_graded(me, prompts, settings, step=0, purpose=purpose, terms={}, told=told)
        answers[domain] = rollouts
        return rollouts

    with beside_the_step(me):
        scores = accuracy(sample, me.validation, me.config, domains=domains)
        me.samples.write_evaluation(model, answers)
    # a resumed run has not evaluated: the next step must not find these prompts in the cache
    engine.llm.reset_prefix_cache()
    if model == me.name:
        _note_changes(me, answers)
    return scores


def _note_changes(me: Branch, answers: Mapping[str, Sequence[Rollout]]) -> None:
    """Which prompts this branch no longer solves, and which it solves now, since the evaluation before.

    Two models of one accuracy may solve other prompts. What OPCoD promises is that few correct answers are
    broken.
    """
    for domain, rollouts in answers.items():
        now = solved(rollouts)
        before = me.solved.get(domain)
        if before is not None:
            asked = {rollout.prompt.prompt_id for rollout in rollouts}
            held, missed = asked & before, asked - before
            me.metrics.mean(f"validation/broken_fraction/{domain}", float(len(held - now)), len(held))
            me.metrics.mean(f"validation/gained_fraction/{domain}", float(len(missed & now)), len(missed))
        me.solved[domain] = now


@contextlib.contextmanager
def beside_the_step(me: Branch) -> Iterator[None]:
    """What is sampled and graded in the block counts neither as a step's nor as the run's training."""
    metrics, tokens, graded = me.metrics, me.num_sampled_tokens, me.grader.counters()
    me.metrics = Metrics()
    try:
        with me.clock.part("evaluation"):
            yield
    finally:
        me.metrics, me.num_sampled_tokens = metrics, tokens
        me.grader.restore_counters(graded)


def load_folder(me: Branch, folder: str | Path) -> None:
    """Puts a Hugging Face folder's weights into the engine (version -1: not the actor's)."""
    if me.engine is not None:
        with me.world.watch.operation(f"rollout.load {Path(folder).name}"):
            me.engine.load_weights(HFFolder(folder).iterate(), version=-1)


def write_table(me: Branch, rows: Accuracies) -> str:
    """Saves the table in the run directory and returns it as text."""
    counts = num_prompts(me.validation)
    if me.world.is_first:
        save_table(
            me.run_dir,
            rows,
            list(me.validation),
            num_prompts=counts,
            step=num_steps(me.config.schedule),
        )
    return render_table(rows, list(me.validation), num_prompts=counts)
