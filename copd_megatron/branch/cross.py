"""The cross rows of a step: on-policy distillation between branches (Eq. 8)."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from copd_megatron.branch.native import score
from copd_megatron.branch.probes import _behaviour_metrics, _behaviour_probes, _topk_ids
from copd_megatron.branch.sampling import _reward_metrics, sample_and_grade
from copd_megatron.branch.schedule import Phase, Step
from copd_megatron.branch.state import Branch
from copd_megatron.config.graph import Edge
from copd_megatron.config.schema import TeacherMode
from copd_megatron.objectives.distill import cross_rows
from copd_megatron.opd.records import ScoreRequest, TeacherScore
from copd_megatron.records import Rollout, TrainRow


def cross_batch(me: Branch, step: Step, native: Sequence[Rollout]) -> list[TrainRow]:
    """Exchanges with the other branches; returns the cross rows of this branch.

    In Phase II, for every edge into this branch: sample on the edge's prompts, score with my own weights,
    have the teacher score, and make token advantages beta * delta. In every phase, behaviour is measured on
    a few of my native rollouts. Collective over all branches.
    """
    _refresh_teacher(me, step)
    rollouts: dict[Edge, list[Rollout]] = {}
    if step.phase is Phase.opd:
        for edge in me.graph.into(me.name):
            prompts = me.edge_prompts[edge].next(edge.num_prompts)
            rollouts[edge] = sample_and_grade(me, prompts, edge.num_generations, step, purpose=edge.name)
            _reward_metrics(me, f"cross/{edge.teacher}/", rollouts[edge])
    probes = _behaviour_probes(me, step, native)
    requests = {
        edge: [_request(i, r, ()) for i, r in enumerate(rollouts.get(edge, []))]
        + [_request(-1 - i, r, states) for i, (r, states) in enumerate(probes)]
        for edge in me.graph.into(me.name)
    }
    mine = {edge: score(me, rollouts[edge]) for edge in rollouts}
    probed = score(me, [r for r, _ in probes], [states for _, states in probes]) if probes else []
    begin = time.perf_counter()
    theirs = me.router.exchange(requests, lambda edge, wanted: teach(me, wanted, step))
    me.metrics.maximum("timing/exchange_seconds", time.perf_counter() - begin)
    if me.media is not None:
        me.media.drop_encoded()
    for edge in requests:
        traffic = me.router.traffic[edge]
        me.metrics.total(f"copd/router_bytes/{edge.name}", traffic.sent_bytes + traffic.received_bytes)
    rows: list[TrainRow] = []
    for edge, sampled in rollouts.items():
        scores = theirs[edge][: len(sampled)]
        rows += cross_rows(
            sampled,
            [s.logprobs for s in scores],
            [s.logprobs for s in mine[edge]],
            teacher=edge.teacher,
            beta=edge.beta,
            delta_clip=me.config.opd.delta_clip,
        )
        gap = np.concatenate([t.logprobs - s.logprobs for t, s in zip(scores, mine[edge], strict=True)])
        me.metrics.mean(f"copd/teacher_gap/{edge.name}", float(gap.sum()), len(gap))
    for edge in requests:
        _behaviour_metrics(me, edge, probed, theirs[edge][len(rollouts.get(edge, [])) :])
    return rows


def teach(me: Branch, requests: Sequence[ScoreRequest], step: Step) -> list[TeacherScore]:
    """Scores another branch's rows with the weights that this branch teaches with in Phase II (in Phase I,
    where only behaviour is measured, with the live ones)."""
    begin = time.perf_counter()
    with me.actor.using(me.teacher if step.phase is Phase.opd else None) as version:
        scores = score(me, requests, [r.state_positions.tolist() for r in requests])
    me.metrics.maximum("timing/teaching_seconds", time.perf_counter() - begin)
    return [
        TeacherScore(
            row_id=request.row_id,
            logprobs=s.logprobs,
            weight_version=version,
            topk_ids=_topk_ids(s.state_logprobs, me.config.opd.behaviour.top_k),
            state_logprobs=s.state_logprobs,
        )
        for request, s in zip(requests, scores, strict=True)
    ]


def _refresh_teacher(me: Branch, step: Step) -> None:
    """Takes the snapshot this branch teaches with, when the teacher mode says so (before any update)."""
    if step.phase is not Phase.opd or not me.trains:
        return
    mode, opd = me.config.opd.teacher_mode, me.config.opd
    due = step.index_in_phase == 0
    if mode is TeacherMode.every_n_steps:
        due = due or step.index_in_phase % opd.snapshot_every_steps == 0
    if mode is not TeacherMode.live and due:
        me.teacher = me.actor.snapshot(into=me.teacher)


def _request(row_id: int, rollout: Rollout, states: Sequence[int]) -> ScoreRequest:
    return ScoreRequest(
        row_id=row_id,
        token_ids=rollout.token_ids,
        prompt_length=rollout.prompt_length,
        weight_version=rollout.weight_version,
        state_positions=np.asarray(states, dtype=np.int32),
        media=rollout.media,
    )
