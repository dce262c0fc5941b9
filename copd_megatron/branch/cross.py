"""Cross rows: what a branch learns from its teachers (Eq. 8), and how alike it is to them (Eq. 6).

For every edge into a branch there is a list of questions to the teacher. In Phase II it holds the rollouts on
the edge's prompts, with what the edge's objective asks; in every phase, a few native rollouts (probes) with a
question about a few positions. An edge of weight 0 has no rollouts. Teachers see rows and questions, not what
they are for.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from copd_megatron.branch.probes import Probe, behaviour_metrics, choose_probes, score_probes
from copd_megatron.branch.sampling import reward_metrics, sample_and_grade
from copd_megatron.branch.schedule import Phase, Step
from copd_megatron.branch.scoring import logprobs_of, refresh_teacher, teach
from copd_megatron.branch.state import Batch, Branch
from copd_megatron.config.graph import Edge
from copd_megatron.objectives.base import Material
from copd_megatron.opd.records import ScoreRequest, TeacherScore
from copd_megatron.records import Ask, FloatArray, Rollout, TrainRow


@dataclass(frozen=True, kw_only=True)
class _Answers:
    """What an edge's teacher said."""

    rollouts: Sequence[TeacherScore]
    probes: Sequence[TeacherScore]


def cross(me: Branch, step: Step, batch: Batch) -> Batch:
    """Stage of a step: adds the rows of every edge into this branch. Collective over all branches.

    Samples on the edges' prompts, scores the samples with the branch's own weights, asks the teachers, and
    has each edge's objective make rows of it. Meanwhile this branch answers as a teacher.
    """
    refresh_teacher(me, step)
    sampled = _sample_edges(me, step)
    # without rows of its own, a branch is compared on the states that it visits on its teachers' prompts
    visited = batch.native or [rollout for rollouts in sampled.values() for rollout in rollouts]
    probes = choose_probes(me, step, visited)
    own = {edge: logprobs_of(me, rollouts) for edge, rollouts in sampled.items()}
    probed = score_probes(me, probes)
    answers = _ask_teachers(me, step, sampled, probes)
    rows = [
        row
        for edge, rollouts in sampled.items()
        for row in _rows(me, edge, rollouts, own[edge], answers[edge].rollouts)
    ]
    for edge in me.graph.into(me.name):
        behaviour_metrics(me, edge, probed, answers[edge].probes)
    return replace(batch, rows=[*batch.rows, *rows])


def _sample_edges(me: Branch, step: Step) -> dict[Edge, list[Rollout]]:
    """In Phase II, this branch's rollouts on the prompts of every edge into it."""
    sampled: dict[Edge, list[Rollout]] = {}
    if step.phase is not Phase.opd:
        return sampled
    for edge in me.graph.into(me.name):
        if not edge.weight:
            continue
        prompts = me.edge_prompts[edge].next(edge.num_prompts)
        sampled[edge] = sample_and_grade(me, prompts, edge.num_generations, step, purpose=edge.name)
        reward_metrics(me, f"cross/{edge.teacher}/", sampled[edge])
    return sampled


def _ask_teachers(
    me: Branch, step: Step, sampled: Mapping[Edge, Sequence[Rollout]], probes: Sequence[Probe]
) -> dict[Edge, _Answers]:
    """One exchange: this branch's questions out, its teachers' answers back, and those of its students
    answered in between. Collective over all branches."""
    questions = {
        edge: [
            *((rollout, me.objectives[edge.component].asks) for rollout in sampled.get(edge, ())),
            *((probe.rollout, probe.ask) for probe in probes),
        ]
        for edge in me.graph.into(me.name)
    }
    requests = {
        edge: [_request(number, *question) for number, question in enumerate(asked)]
        for edge, asked in questions.items()
    }
    begin = time.perf_counter()
    scores = me.router.exchange(requests, lambda edge, wanted: teach(me, wanted, step))
    me.metrics.maximum("timing/exchange_seconds", time.perf_counter() - begin)
    if me.media is not None:
        me.media.drop_encoded()
    answers = {}
    for edge in requests:
        traffic, count = me.router.traffic[edge], len(sampled.get(edge, ()))
        me.metrics.total(f"copd/router_bytes/{edge.name}", traffic.sent_bytes + traffic.received_bytes)
        answers[edge] = _Answers(rollouts=scores[edge][:count], probes=scores[edge][count:])
    return answers


def _request(number: int, rollout: Rollout, ask: Ask) -> ScoreRequest:
    return ScoreRequest(
        row_id=number,
        token_ids=rollout.token_ids,
        prompt_length=rollout.prompt_length,
        weight_version=rollout.weight_version,
        ask=ask,
        media=rollout.media,
    )


def _rows(
    me: Branch,
    edge: Edge,
    rollouts: Sequence[Rollout],
    own: Sequence[FloatArray],
    answers: Sequence[TeacherScore],
) -> list[TrainRow]:
    """An edge's training rows."""
    objective = me.objectives[edge.component]
    theirs = [answer.logprobs for answer in answers] if objective.asks.tokens else None
    me.samples.note(edge.component, rollouts, edge=edge.name, student=own, teacher=theirs)
    rows = objective.rows(
        Material(rollouts=rollouts, component=edge.component, old_logprobs=own, teacher_logprobs=theirs)
    )
    if theirs is not None:
        gap = np.concatenate([t - s for t, s in zip(theirs, own, strict=True)])
        me.metrics.mean(f"copd/teacher_gap/{edge.name}", float(gap.sum()), len(gap))
    return [replace(row, component_weight=edge.weight) for row in rows]
