"""Log-probabilities: of rollouts under the branch's own actor, and, as teacher, of another branch's rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from copd_megatron.branch.schedule import Phase, Step
from copd_megatron.branch.state import Branch
from copd_megatron.config.schema import TeacherMode
from copd_megatron.metrics.phase_memory import phase_memory
from copd_megatron.opd.records import ScoreRequest, TeacherScore
from copd_megatron.policy.actor import SequenceScore
from copd_megatron.records import FloatArray, IntArray, Rollout


def score(
    me: Branch,
    sequences: Sequence[Rollout | ScoreRequest],
    states: Sequence[Sequence[int]] | None = None,
    *,
    top_k: int = 0,
    support: Sequence[IntArray] | None = None,
    temperature: float = 1.0,
) -> list[SequenceScore]:
    """The actor's log-probabilities, as a named operation; collective over the branch.

    Args:
        sequences: the same on every rank of the branch.
        states: response positions of each sequence whose full distribution is wanted; None: none.
        top_k: likeliest ids wanted at every response token.
        support: [R, k] ids of each sequence whose log-probabilities are wanted.
        temperature: factor on the sampling temperature.
    """
    with (
        me.world.watch.operation("policy.log_probs", ranks=me.world.branch_ranks[me.name]),
        phase_memory(me.metrics, "scoring"),
    ):
        return me.actor.log_probs(sequences, states, top_k=top_k, support=support, temperature=temperature)


def logprobs_of(me: Branch, rollouts: Sequence[Rollout]) -> list[FloatArray]:
    """[R] of each rollout under the actor's current weights."""
    return [s.logprobs for s in score(me, rollouts)]


def reference_logprobs(me: Branch, rollouts: Sequence[Rollout]) -> list[FloatArray] | None:
    """[R] of each rollout under the base model; None where no copy of it is kept."""
    if me.reference is None:
        return None
    with me.actor.using(me.reference):
        return logprobs_of(me, rollouts)


def teach(me: Branch, requests: Sequence[ScoreRequest], step: Step) -> list[TeacherScore]:
    """Answers another branch's requests, in their order, with the weights that this branch teaches with in
    Phase II (in Phase I, where only behaviour is measured, with the live ones)."""
    with me.actor.using(me.teacher if step.phase is Phase.opd else None) as version:
        scores = _scored_by_kind(me, requests)
    return [_answer(request, s, version) for request, s in zip(requests, scores, strict=True)]


def _scored_by_kind(me: Branch, requests: Sequence[ScoreRequest]) -> list[SequenceScore]:
    """One scoring pass for all requests that ask for the same numbers by token, at the same temperature."""
    kinds: dict[tuple[int, int, float], list[int]] = {}
    for number, request in enumerate(requests):
        width = 0 if request.support_ids is None else request.support_ids.shape[1]
        kinds.setdefault((request.ask.top_k, width, request.ask.temperature), []).append(number)
    said: dict[int, SequenceScore] = {}
    for (top_k, _, temperature), members in kinds.items():
        asked = [requests[i] for i in members]
        support = [ids for r in asked if (ids := r.support_ids) is not None]
        scores = score(
            me,
            asked,
            [r.ask.positions for r in asked],
            top_k=top_k,
            support=support or None,
            temperature=temperature,
        )
        said |= dict(zip(members, scores, strict=True))
    return [said[number] for number in range(len(requests))]


def _answer(request: ScoreRequest, said: SequenceScore, version: int) -> TeacherScore:
    """What was asked of what the actor said."""
    nothing = said.logprobs[:0]
    return TeacherScore(
        row_id=request.row_id,
        weight_version=version,
        logprobs=said.logprobs if request.ask.tokens else nothing,
        distributions=said.state_logprobs,
        top=said.top,
        support_logprobs=said.support_logprobs,
        entropy=said.entropy if request.ask.entropy else None,
    )


def refresh_teacher(me: Branch, step: Step) -> None:
    """Takes the snapshot that this branch teaches with, when the teacher mode says so (before any update)."""
    if step.phase is not Phase.opd or not me.trains:
        return
    mode, opd = me.config.opd.teacher_mode, me.config.opd
    due = step.index_in_phase == 0
    if mode is TeacherMode.every_n_steps:
        due = due or step.index_in_phase % opd.snapshot_every_steps == 0
    if mode is TeacherMode.ema and me.teacher is not None:
        me.teacher = me.actor.blend(me.teacher, opd.ema_rate)
    elif mode is not TeacherMode.live and due:
        average = mode is TeacherMode.ema
        me.teacher = me.actor.snapshot(into=me.teacher, dtype=torch.float32 if average else None)
