"""The native rows of a step: the branch's own prompts, sampled, graded, with GRPO advantages (Eq. 7, 11)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from copd_megatron.branch.sampling import _fresh_groups, _reward_metrics, _rewards
from copd_megatron.branch.schedule import Step
from copd_megatron.branch.state import Branch
from copd_megatron.config.schema import MismatchCorrection
from copd_megatron.metrics.phase_memory import phase_memory
from copd_megatron.objectives.grpo import informative_groups, native_rows
from copd_megatron.opd.records import ScoreRequest
from copd_megatron.policy.actor import SequenceScore
from copd_megatron.records import FloatArray, Rollout, TrainRow


@dataclass(kw_only=True)
class Batch:
    """A branch's training rows of one step and the rollouts they came from."""

    native: list[Rollout] = field(default_factory=list)
    rows: list[TrainRow] = field(default_factory=list)


def native_batch(me: Branch, step: Step) -> Batch:
    """This branch's own prompts: sampled, graded, turned into GRPO rows.

    With dynamic sampling, groups whose rewards are all equal are dropped and further prompts sampled in
    their place, up to ``dynamic_sampling_max_rounds`` rounds.
    """
    if not me.trains:
        return Batch()
    assert me.prompts is not None
    options = me.config.advantage
    wanted, rollouts = me.settings.num_prompts_per_step, list[Rollout]()
    rounds = options.dynamic_sampling_max_rounds if options.dynamic_sampling else 1
    for _ in range(rounds):
        missing = wanted - len({r.prompt.group_id for r in rollouts})
        if missing <= 0:
            break
        fresh = _fresh_groups(me, missing, step)
        _reward_metrics(me, "train/", fresh)
        if options.dynamic_sampling:
            keep = informative_groups(_rewards(fresh), [r.prompt.group_id for r in fresh])
            me.metrics.mean("train/uninformative_fraction", float((~keep).sum()), len(keep))
            fresh = [r for r, kept in zip(fresh, keep, strict=True) if kept]
        rollouts += fresh
    old, reference = _start_of_step_logprobs(me, rollouts)
    rows = native_rows(
        rollouts,
        options,
        me.config.loss,
        me.settings.rollout.max_new_tokens,
        old_logprobs=old,
        reference_logprobs=reference,
    )
    # begun by earlier weights: the ratio is to what sampled each token
    rows = [
        replace(row, old_logprobs=row.rollout_logprobs)
        if row.old_logprobs is None and row.weight_version < me.actor.version
        else row
        for row in rows
    ]
    return Batch(native=rollouts, rows=rows)


def _start_of_step_logprobs(
    me: Branch, rollouts: Sequence[Rollout]
) -> tuple[list[FloatArray] | None, list[FloatArray] | None]:
    """Log-probabilities under the start-of-step and the reference weights, where something needs them.

    On-policy with one optimizer step a batch, the update's own forward pass gives the former.
    """
    loss = me.config.loss
    in_reward = bool(loss.kl_coefficient) and me.reference is not None
    needs_old = (
        me.config.training.num_mini_batches > 1
        or loss.mismatch_correction is not MismatchCorrection.none
        or in_reward
    )
    old = [s.logprobs for s in score(me, rollouts)] if needs_old else None
    reference = None
    if me.reference is not None:
        with me.actor.using(me.reference):
            reference = [s.logprobs for s in score(me, rollouts)]
    return old, reference


def score(
    me: Branch, sequences: Sequence[Rollout | ScoreRequest], states: Sequence[Sequence[int]] | None = None
) -> list[SequenceScore]:
    """The actor's log-probabilities, as a named operation."""
    with (
        me.world.watch.operation("policy.log_probs", ranks=me.world.branch_ranks[me.name]),
        phase_memory(me.metrics, "scoring"),
    ):
        return me.actor.log_probs(sequences, states)
