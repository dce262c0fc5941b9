"""Cross rows: what a branch learns from its teachers (Eq. 8), and how alike it is to them (Eq. 6).

For every edge into a branch there is a list of questions to the teacher. In Phase II it holds the rollouts on
the edge's prompts, with what the edge's objective asks; in every phase, a few native rollouts (probes) with a
question about a few positions. An edge of weight 0 has no rollouts. Teachers see rows and questions, not what
they are for. A branch that is its own teacher answers itself: nothing of that crosses.

What changes rows on the way, each off by default: a context that only the teacher reads (``privileged``), a
gate that closes where the teacher is no better (``gate``), and what the responses' verdicts say of the
teacher's scores (``objectives/calibration``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from copd_megatron.branch.gate import open_rollouts
from copd_megatron.branch.privileged import privileged_prompts
from copd_megatron.branch.probes import Probe, behaviour_metrics, choose_probes, score_probes
from copd_megatron.branch.sampling import reward_metrics, sample_and_grade
from copd_megatron.branch.schedule import Phase, Step, exchange_due
from copd_megatron.branch.scoring import reference_logprobs, refresh_teacher, score, teach
from copd_megatron.branch.state import Batch, Branch
from copd_megatron.config.graph import Edge
from copd_megatron.data.seeds import sample_seed
from copd_megatron.objectives.base import Material
from copd_megatron.objectives.calibration import Calibrated, calibrate
from copd_megatron.opd.records import ScoreRequest, TeacherScore
from copd_megatron.policy.actor import SequenceScore
from copd_megatron.records import Ask, FloatArray, IntArray, Rollout, TrainRow


@dataclass(frozen=True, kw_only=True)
class _Lesson:
    """What an edge's rows are made of."""

    rollouts: Sequence[Rollout]
    own: Sequence[SequenceScore] | None
    """What the student's own actor says of them; None: it has not been asked yet."""
    prompts: Sequence[IntArray | None]
    """[P'] what the teacher reads instead of each rollout's prompt; None: nothing, and the rollout teaches
    nothing."""
    is_open: Sequence[bool]
    """Whether the teacher may teach on it."""


@dataclass(frozen=True, kw_only=True)
class _Answers:
    """What an edge's teacher said."""

    rollouts: Sequence[TeacherScore]
    """Of the rollouts that teach."""
    probes: Sequence[TeacherScore]


def cross(me: Branch, step: Step, batch: Batch) -> Batch:
    """Stage of a step: adds the rows of every edge into this branch. Collective over all branches.

    Samples on the edges' prompts, asks the teachers, scores the samples with the branch's own weights while
    the questions are on their way, answers as a teacher, and has each edge's objective make rows of it.
    """
    refresh_teacher(me, step)
    sampled = _sample_edges(me, step)
    # without rows of its own, a branch is compared on the states that it visits on its teachers' prompts
    visited = batch.native or [rollout for rollouts in sampled.values() for rollout in rollouts]
    probes = choose_probes(me, step, visited)
    lessons = _lessons(me, step, sampled)
    asked = _ask_teachers(me, step, lessons, probes)
    lessons = {edge: _with_own(me, edge, lesson) for edge, lesson in lessons.items()}
    probed = score_probes(me, probes)
    answers = _answers_of(me, step, asked)
    rows = [row for edge in lessons for row in _rows(me, step, edge, lessons[edge], answers[edge].rollouts)]
    for edge in me.graph.into(me.name):
        if not edge.is_self:
            behaviour_metrics(me, edge, probed, answers[edge].probes)
    return replace(batch, rows=[*batch.rows, *rows])


def _sample_edges(me: Branch, step: Step) -> dict[Edge, list[Rollout]]:
    """In Phase II, this branch's rollouts on the prompts of every edge into it."""
    sampled: dict[Edge, list[Rollout]] = {}
    if step.phase is not Phase.opd:
        return sampled
    grade = me.config.opd.grade_responses
    for edge in me.graph.into(me.name):
        if not edge.weight:
            continue
        prompts = me.edge_prompts[edge].next(edge.num_prompts)
        sampled[edge] = sample_and_grade(
            me, prompts, edge.num_generations, step, purpose=edge.name, grade=grade
        )
        reward_metrics(me, f"cross/{edge.teacher}/", sampled[edge])
    return sampled


def _lessons(me: Branch, step: Step, sampled: Mapping[Edge, Sequence[Rollout]]) -> dict[Edge, _Lesson]:
    """The rollouts with what their teachers may read and teach, and with the student's own scores where the
    question is about them. Collective over all branches where a gate is on or peers give feedback."""
    if step.phase is not Phase.opd:
        return {}
    privileged = privileged_prompts(me, step, sampled)
    is_open = open_rollouts(me, step, sampled)
    lessons = {
        edge: _Lesson(
            rollouts=rollouts,
            own=None,
            prompts=privileged.get(edge, [rollout.prompt.token_ids for rollout in rollouts]),
            is_open=is_open.get(edge, [True] * len(rollouts)),
        )
        for edge, rollouts in sampled.items()
    }
    return {
        edge: _with_own(me, edge, lesson) if me.objectives[edge.component].asks.support else lesson
        for edge, lesson in lessons.items()
    }


def _with_own(me: Branch, edge: Edge, lesson: _Lesson) -> _Lesson:
    """The lesson with the student's own scores."""
    if lesson.own is not None:
        return lesson
    top_k = me.objectives[edge.component].asks_own.top_k
    return replace(lesson, own=score(me, lesson.rollouts, top_k=top_k))


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What is asked in an exchange."""

    questions: Mapping[Edge, Sequence[ScoreRequest]]
    """About the rollouts that teach, by edge into this branch."""
    requests: Mapping[Edge, Sequence[ScoreRequest]]
    """What crosses: questions and probes, of all edges but those from the branch to itself."""


def _ask_teachers(me: Branch, step: Step, lessons: Mapping[Edge, _Lesson], probes: Sequence[Probe]) -> _Asked:
    """Begins an exchange: this branch's questions go out. Where no ``exchange_due``, nobody asks."""
    asked = {edge: _questions(me, edge, lessons.get(edge)) for edge in me.graph.into(me.name)}
    requests = {
        edge: [
            *questions,
            *(
                _request(len(questions) + i, p.rollout, p.ask, p.rollout.prompt.token_ids)
                for i, p in enumerate(probes)
            ),
        ]
        for edge, questions in asked.items()
        if not edge.is_self
    }
    if exchange_due(me.config, step):
        me.router.post(requests)
    return _Asked(questions=asked, requests=requests)


def _answers_of(me: Branch, step: Step, posted: _Asked) -> dict[Edge, _Answers]:
    """Ends an exchange: students' questions are answered, teachers' answers come in."""
    asked, requests = posted.questions, posted.requests
    scores: dict[Edge, list[TeacherScore]] = {edge: [] for edge in requests}
    if exchange_due(me.config, step):
        scores = me.router.answer(lambda edge, wanted: teach(me, wanted, step))
    scores |= {edge: _teach_itself(me, edge, asked[edge], step) for edge in asked if edge.is_self}
    if me.media is not None:
        me.media.drop_encoded()
    for edge in requests if exchange_due(me.config, step) else ():
        traffic = me.router.traffic[edge]
        me.metrics.total(f"copd/router_bytes/{edge.name}", traffic.sent_bytes + traffic.received_bytes)
    return {
        edge: _Answers(rollouts=scores[edge][: len(asked[edge])], probes=scores[edge][len(asked[edge]) :])
        for edge in asked
    }


def _teach_itself(me: Branch, edge: Edge, asked: Sequence[ScoreRequest], step: Step) -> list[TeacherScore]:
    with me.world.watch.operation(f"opd.score {edge.name}", ranks=me.world.branch_ranks[me.name]):
        return teach(me, asked, step)


def _questions(me: Branch, edge: Edge, lesson: _Lesson | None) -> list[ScoreRequest]:
    """What an edge's objective asks about every rollout that teaches."""
    if lesson is None:
        return []
    ask = me.objectives[edge.component].asks
    questions: list[ScoreRequest] = []
    own: Sequence[SequenceScore | None] = lesson.own or [None] * len(lesson.rollouts)
    for rollout, said, prompt in zip(lesson.rollouts, own, lesson.prompts, strict=True):
        if prompt is None:
            continue
        top = None if said is None else said.top
        support = top.ids if ask.support and top is not None else None
        questions.append(
            _request(len(questions), rollout, ask.of_row(rollout.response_length), prompt, support)
        )
    return questions


def _request(
    number: int, rollout: Rollout, ask: Ask, prompt: IntArray, support: IntArray | None = None
) -> ScoreRequest:
    response = rollout.token_ids[rollout.prompt_length :]
    return ScoreRequest(
        row_id=number,
        token_ids=np.concatenate([prompt, response]).astype(np.int32),
        prompt_length=len(prompt),
        weight_version=rollout.weight_version,
        ask=ask,
        support_ids=support,
        media=rollout.media,
    )


def _rows(
    me: Branch, step: Step, edge: Edge, lesson: _Lesson, answers: Sequence[TeacherScore]
) -> list[TrainRow]:
    """An edge's training rows: of the rollouts that its teacher has something to say about."""
    objective = me.objectives[edge.component]
    assert lesson.own is not None
    taught = [i for i, prompt in enumerate(lesson.prompts) if prompt is not None]
    if not taught:
        return []
    rollouts, own = [lesson.rollouts[i] for i in taught], [lesson.own[i] for i in taught]
    material = _material(me, step, edge, rollouts, own, answers)
    calibrated = None
    if material.teacher_logprobs is not None and material.old_logprobs is not None:
        deltas = [t - s for t, s in zip(material.teacher_logprobs, material.old_logprobs, strict=True)]
        gap = np.concatenate(deltas)
        me.metrics.mean(f"copd/teacher_gap/{edge.name}", float(gap.sum()), len(gap))
        calibrated = _calibrated(me, edge, rollouts, deltas, material.seed)
    me.samples.note(
        edge.component,
        rollouts,
        edge=edge.name,
        student=material.old_logprobs,
        teacher=material.teacher_logprobs,
    )
    shift = None if calibrated is None else calibrated.shift.tolist()
    rows = objective.rows(replace(material, shift=shift))
    masks = [np.ones_like(row.loss_mask) for row in rows] if calibrated is None else calibrated.masks
    return [
        replace(
            row,
            component_weight=edge.weight,
            loss_mask=row.loss_mask * mask * np.float32(lesson.is_open[i]),
        )
        for i, row, mask in zip(taught, rows, masks, strict=True)
    ]


def _material(
    me: Branch,
    step: Step,
    edge: Edge,
    rollouts: Sequence[Rollout],
    own: Sequence[SequenceScore],
    answers: Sequence[TeacherScore],
) -> Material:
    """All that was said of the rollouts."""
    asks = me.objectives[edge.component].asks
    extrapolates = me.config.opd.extrapolation != 1
    return Material(
        rollouts=rollouts,
        component=edge.component,
        old_logprobs=[said.logprobs for said in own],
        reference_logprobs=reference_logprobs(me, rollouts) if extrapolates else None,
        teacher_logprobs=[answer.logprobs for answer in answers] if asks.tokens else None,
        own_top=[said.top for said in own if said.top is not None] or None,
        teacher_top=[answer.top for answer in answers if answer.top is not None] or None,
        teacher_on_support=[a.support_logprobs for a in answers if a.support_logprobs is not None] or None,
        teacher_distributions=[answer.distributions for answer in answers] if asks.everywhere else None,
        teacher_entropy=[a.entropy for a in answers if a.entropy is not None] or None,
        seed=sample_seed(me.config.run.seed, me.name, step.index, f"{edge.name}/rows", 0),
    )


def _calibrated(
    me: Branch, edge: Edge, rollouts: Sequence[Rollout], deltas: Sequence[FloatArray], seed: int
) -> Calibrated | None:
    """What verdicts and gaps change about the rows; None where nothing is switched on."""
    options = me.config.opd.calibration
    if not options.needs_verdicts and options.max_gap is None:
        return None
    groups = [rollout.prompt.group_id for rollout in rollouts]
    found = calibrate(deltas, [rollout.reward for rollout in rollouts], groups, options, seed)
    count, tokens = len(found.margins_before), sum(len(mask) for mask in found.masks)
    me.metrics.mean(f"copd/margin_before/{edge.name}", float(found.margins_before.sum()), count)
    me.metrics.mean(f"copd/margin_after/{edge.name}", float(found.margins_after.sum()), count)
    me.metrics.mean(f"copd/order_consistency/{edge.name}", float(found.num_ordered), count)
    me.metrics.mean(f"copd/masked_fraction/{edge.name}", float(found.num_masked_tokens), tokens)
    return found
