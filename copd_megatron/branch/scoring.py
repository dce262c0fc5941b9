"""Log-probabilities: of rollouts under the branch's own actor, and, as teacher, of another branch's rows."""

from __future__ import annotations

import time
from collections.abc import Sequence

from copd_megatron.branch.schedule import Phase, Step
from copd_megatron.branch.state import Branch
from copd_megatron.config.schema import TeacherMode
from copd_megatron.metrics.phase_memory import phase_memory
from copd_megatron.opd.records import ScoreRequest, TeacherScore
from copd_megatron.policy.actor import SequenceScore
from copd_megatron.records import FloatArray, Rollout


def score(
    me: Branch, sequences: Sequence[Rollout | ScoreRequest], states: Sequence[Sequence[int]] | None = None
) -> list[SequenceScore]:
    """The actor's log-probabilities, as a named operation; collective over the branch.

    Args:
        sequences: the same on every rank of the branch.
        states: response positions of each sequence whose full distribution is wanted; None: none.
    """
    with (
        me.world.watch.operation("policy.log_probs", ranks=me.world.branch_ranks[me.name]),
        phase_memory(me.metrics, "scoring"),
    ):
        return me.actor.log_probs(sequences, states)


def logprobs_of(me: Branch, rollouts: Sequence[Rollout]) -> list[FloatArray]:
    """[R] of each rollout under the actor's current weights."""
    return [s.logprobs for s in score(me, rollouts)]


def reference_logprobs(me: Branch, rollouts: Sequence[Rollout]) -> list[FloatArray] | None:
    """[R] of each rollout under the base model; None where the loss has no KL term."""
    if me.reference is None:
        return None
    with me.actor.using(me.reference):
        return logprobs_of(me, rollouts)


def teach(me: Branch, requests: Sequence[ScoreRequest], step: Step) -> list[TeacherScore]:
    """Answers another branch's requests, in their order, with the weights that this branch teaches with in
    Phase II (in Phase I, where only behaviour is measured, with the live ones)."""
    begin = time.perf_counter()
    with me.actor.using(me.teacher if step.phase is Phase.opd else None) as version:
        scores = score(me, requests, [r.ask.positions for r in requests])
    me.metrics.maximum("timing/teaching_seconds", time.perf_counter() - begin)
    return [_answer(request, s, version) for request, s in zip(requests, scores, strict=True)]


def _answer(request: ScoreRequest, said: SequenceScore, version: int) -> TeacherScore:
    """What was asked of what the actor said."""
    nothing = said.logprobs[:0]
    return TeacherScore(
        row_id=request.row_id,
        weight_version=version,
        logprobs=said.logprobs if request.ask.tokens else nothing,
        distributions=said.state_logprobs,
    )


def refresh_teacher(me: Branch, step: Step) -> None:
    """Takes the snapshot that this branch teaches with, when the teacher mode says so (before any update)."""
    if step.phase is not Phase.opd or not me.trains:
        return
    mode, opd = me.config.opd.teacher_mode, me.config.opd
    due = step.index_in_phase == 0
    if mode is TeacherMode.every_n_steps:
        due = due or step.index_in_phase % opd.snapshot_every_steps == 0
    if mode is not TeacherMode.live and due:
        me.teacher = me.actor.snapshot(into=me.teacher)
