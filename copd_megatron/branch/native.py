"""Native rows: the branch's own prompts, sampled, graded, made into rows by its objective (Eq. 7, 11)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from copd_megatron.branch.sampling import graded_only, reward_metrics, rewards_of, sample_and_grade
from copd_megatron.branch.schedule import Step
from copd_megatron.branch.scoring import logprobs_of, reference_logprobs
from copd_megatron.branch.state import Batch, Branch
from copd_megatron.objectives.base import Material
from copd_megatron.objectives.grpo import informative_groups
from copd_megatron.records import NATIVE, Prompt, Rollout, TrainRow
from copd_megatron.rollout.early_stop import EarlyStop, carried, continued, num_asked, split_groups


def native(me: Branch, step: Step, batch: Batch) -> Batch:
    """Stage of a step: adds this branch's own rollouts and their training rows."""
    if not me.trains or not me.config.native.weight:
        return batch
    rollouts = sample_native(me, step)
    return replace(
        batch, native=[*batch.native, *rollouts], rows=[*batch.rows, *native_rows_of(me, rollouts)]
    )


def sample_native(me: Branch, step: Step) -> list[Rollout]:
    """Graded rollouts of this step's own prompts.

    With dynamic sampling, groups whose rewards are all equal are dropped and further prompts sampled in
    their place, up to ``dynamic_sampling_max_rounds`` rounds.
    """
    options, rollouts = me.config.advantage, list[Rollout]()
    rounds = options.dynamic_sampling_max_rounds if options.dynamic_sampling else 1
    for _ in range(rounds):
        missing = me.settings.num_prompts_per_step - len({r.prompt.group_id for r in rollouts})
        if missing <= 0:
            break
        fresh = _fresh_groups(me, missing, step, drawn=[r.prompt for r in rollouts])
        reward_metrics(me, "train/", fresh)
        me.samples.note(NATIVE, fresh)
        fresh = graded_only(fresh)
        if options.dynamic_sampling:
            keep = informative_groups(rewards_of(fresh), [r.prompt.group_id for r in fresh])
            me.metrics.mean("train/uninformative_fraction", float((~keep).sum()), len(keep))
            fresh = [r for r, kept in zip(fresh, keep, strict=True) if kept]
        rollouts += fresh
    return rollouts


def native_rows_of(me: Branch, rollouts: Sequence[Rollout]) -> list[TrainRow]:
    """Training rows of graded native rollouts."""
    objective = me.objectives[NATIVE]
    needs_old = objective.needs_old_logprobs or me.config.training.num_mini_batches > 1
    rows = objective.rows(
        Material(
            rollouts=rollouts,
            component=NATIVE,
            # else the update's own forward pass gives them
            old_logprobs=logprobs_of(me, rollouts) if needs_old else None,
            reference_logprobs=reference_logprobs(me, rollouts) if me.config.loss.kl_coefficient else None,
        )
    )
    weight = me.config.native.weight
    return [replace(_against_sampler(me, row), component_weight=weight) for row in rows]


def _against_sampler(me: Branch, row: TrainRow) -> TrainRow:
    """A row begun by earlier weights takes the ratio to what sampled each of its tokens."""
    if row.weight_version < me.actor.version:
        return replace(row, old_logprobs=row.rollout_logprobs)
    return row


def _fresh_groups(me: Branch, wanted: int, step: Step, *, drawn: Sequence[Prompt]) -> list[Rollout]:
    """All responses to ``wanted`` prompts; with over-sampling, to those that are done first.

    ``drawn``: prompts that the step already has, whose group ids are taken.
    """
    assert me.prompts is not None
    count, options = me.settings.num_generations_per_prompt, me.settings.rollout
    if not options.over_sampling:
        return sample_and_grade(me, me.prompts.next(wanted, drawn=drawn), count, step)
    asked = num_asked(wanted, options.over_sampling)
    lag = me.config.training.max_weight_lag
    begun = carried(me.begun, version=me.actor.version, max_lag=lag)[:asked]
    prompts = continued(me.prompts.next(asked - len(begun)), begun, drawn)
    stop = EarlyStop(
        num_prompts=wanted, begun={(r.prompt.group_id, r.sample_index): r for g in begun for r in g}
    )
    rollouts = sample_and_grade(me, prompts, count, step, stop=stop)
    complete, left = split_groups(rollouts, count, wanted)
    me.begun = left if options.partial_rollouts else []
    me.metrics.value("train/carried_prompts", float(len(begun)))
    me.metrics.value("train/unfinished_prompts", float(len(left)))
    return complete
