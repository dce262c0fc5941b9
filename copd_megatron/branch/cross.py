"""Cross rows: what a branch learns from its teachers (Eq. 8), and how alike it is to them (Eq. 6).

For every edge into a branch there is a list of questions to the teacher. In Phase II it holds the rollouts on
the edge's prompts, with what the edge's objective asks; in every phase, a few native rollouts (probes) with a
question about a few positions. An edge of weight 0 has no rollouts. Teachers see rows and questions, not what
they are for. A branch that is its own teacher answers itself: nothing of that crosses.

What changes rows on the way, each off by default: a context that only the teacher reads (``privileged``), a
gate that closes where the teacher is no better (``gate``), and what the responses' verdicts say of the
teacher's scores (``objectives/calibration``).

With ``opd.max_teacher_lag=1`` a step's questions are asked in the step before, within a phase. They come from
the weights of that step, which the importance ratio of their rows accounts for; teachers answer at the
beginning of the step that learns from the answers, with the weights that they would use without the lag. What
is asked, by which weights it is sampled and by which it is scored follows from the schedule alone, so all
numbers stay those of the seed, whatever the branches' speeds; only who waits for whom depends on time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from copd_megatron.branch.gate import open_rollouts
from copd_megatron.branch.lessons import Asked, Lesson
from copd_megatron.branch.privileged import privileged_prompts
from copd_megatron.branch.probes import behaviour_metrics, choose_probes, score_probes
from copd_megatron.branch.sampling import reward_metrics, sample_and_grade
from copd_megatron.branch.schedule import Phase, Step, asked_ahead, exchange_due
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
class _Answers:
    """What an edge's teacher said."""

    rollouts: Sequence[TeacherScore]
    """Of the rollouts that teach."""
    probes: Sequence[TeacherScore]


def answer(me: Branch, step: Step, batch: Batch) -> Batch:
    """Stage of a step, before anything is sampled: answers as a teacher what was asked in the step before.
    Collective over all branches. Without ``opd.max_teacher_lag`` nothing was, and it does nothing."""
    if me.ahead is None:
        return batch
    if not me.router.is_open:  # it was asked before the run stopped
        me.router.post(_requests(me, me.ahead))
    if not me.router.is_taught:
        refresh_teacher(me, step)
        me.router.teach(lambda edge, wanted: teach(me, wanted, step))
    return batch


def cross(me: Branch, step: Step, batch: Batch) -> Batch:
    """Stage of a step: adds the rows of every edge into this branch. Collective over all branches.

    Samples on the edges' prompts, asks the teachers, scores the samples with the branch's own weights while
    the questions are on their way, answers as a teacher, and has each edge's objective make rows of it. With
    ``opd.max_teacher_lag`` what it samples and asks is the next step's, besides this step's in the first of a
    phase.
    """
    answer(me, step, batch)  # unless the recipe has done so
    asked, me.ahead = me.ahead, None
    crosses = asked is not None or exchange_due(me.config, step)
    if asked is None:
        refresh_teacher(me, step)
        asked = _ask(me, step, batch.native)
    following = asked_ahead(me.config, step)
    if following is not None:
        me.ahead = _ask(me, following, batch.native)
    probed = score_probes(me, asked.probes)
    answers = _answers_of(me, step, asked, crosses=crosses)
    rows = []
    for edge, lesson in asked.lessons.items():
        reward_metrics(me, f"cross/{edge.teacher}/", lesson.rollouts)
        rows += _rows(me, step, edge, lesson, answers[edge].rollouts)
    for edge in me.graph.into(me.name):
        if not edge.is_self:
            behaviour_metrics(me, edge, probed, answers[edge].probes)
    return replace(batch, rows=[*batch.rows, *rows])


def _ask(me: Branch, step: Step, native: Sequence[Rollout]) -> Asked:
    """Samples what a step learns from and sends the questions off; scores the samples meanwhile.

    Args:
        step: this one, or the next.
        native: this branch's own rollouts of this step, some of which are probes.
    """
    sampled = _sample_edges(me, step)
    # without rows of its own, a branch is compared on the states that it visits on its teachers' prompts
    visited = native or [rollout for rollouts in sampled.values() for rollout in rollouts]
    probes = choose_probes(me, step, visited)
    asked = Asked(lessons=_lessons(me, step, sampled), probes=probes)
    if exchange_due(me.config, step):
        me.router.post(_requests(me, asked))
    return replace(
        asked, lessons={edge: _with_own(me, edge, lesson) for edge, lesson in asked.lessons.items()}
    )


def _sample_edges(me: Branch, step: Step) -> dict[Edge, list[Rollout]]:
    """In Phase II, this branch's rollouts on the prompts of every edge into it."""
    sampled: dict[Edge, list[Rollout]] = {}
    if step.phase is not Phase.opd:
        return sampled
    grade = me.config.opd.grade_responses
    for edge in me.graph.into(me.name):
        if edge.weight:
            prompts = me.edge_prompts[edge].next(edge.num_prompts)
            sampled[edge] = sample_and_grade(
                me, prompts, edge.num_generations, step, purpose=edge.name, grade=grade
            )
    return sampled


def _lessons(me: Branch, step: Step, sampled: Mapping[Edge, Sequence[Rollout]]) -> dict[Edge, Lesson]:
    """The rollouts with what their teachers may read and teach, and with the student's own scores where the
    question is about them. Collective over all branches where a gate is on or peers give feedback."""
    if step.phase is not Phase.opd:
        return {}
    privileged = privileged_prompts(me, step, sampled)
    is_open = open_rollouts(me, step, sampled)
    lessons = {
        edge: Lesson(
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


def _with_own(me: Branch, edge: Edge, lesson: Lesson) -> Lesson:
    """The lesson with the student's own scores."""
    if lesson.own is not None:
        return lesson
    top_k = me.objectives[edge.component].asks_own.top_k
    return replace(lesson, own=score(me, lesson.rollouts, top_k=top_k))


def _requests(me: Branch, asked: Asked) -> dict[Edge, list[ScoreRequest]]:
    """What crosses: questions about rollouts, then probes, of all edges but those from the branch to
    itself."""
    requests: dict[Edge, list[ScoreRequest]] = {}
    for edge in me.graph.into(me.name):
        if not edge.is_self:
            questions = _questions(me, edge, asked.lessons.get(edge))
            requests[edge] = questions + [
                _request(len(questions) + i, p.rollout, p.ask, p.rollout.prompt.token_ids)
                for i, p in enumerate(asked.probes)
            ]
    return requests


def _answers_of(me: Branch, step: Step, asked: Asked, *, crosses: bool) -> dict[Edge, _Answers]:
    """Ends this step's exchange, if it has one: students' questions are answered, teachers' answers come
    in."""
    scores: dict[Edge, list[TeacherScore]] = {}
    if crosses and me.router.is_taught:
        scores |= me.router.collect()
    elif crosses:
        scores |= me.router.answer(lambda edge, wanted: teach(me, wanted, step))
    edges = me.graph.into(me.name)
    scores |= {edge: _teach_itself(me, edge, asked, step) for edge in edges if edge.is_self}
    if me.media is not None:
        me.media.drop_encoded()
    for edge in edges if crosses else ():
        if not edge.is_self:
            traffic = me.router.traffic[edge]
            me.metrics.total(f"copd/router_bytes/{edge.name}", traffic.sent_bytes + traffic.received_bytes)
    found = {}
    for edge in edges:
        said, lesson = scores.get(edge, []), asked.lessons.get(edge)
        count = 0 if lesson is None else len(lesson.taught)
        found[edge] = _Answers(rollouts=said[:count], probes=said[count:])
    return found


def _teach_itself(me: Branch, edge: Edge, asked: Asked, step: Step) -> list[TeacherScore]:
    questions = _questions(me, edge, asked.lessons.get(edge))
    with me.world.watch.operation(f"opd.score {edge.name}", ranks=me.world.branch_ranks[me.name]):
        return teach(me, questions, step)


def _questions(me: Branch, edge: Edge, lesson: Lesson | None) -> list[ScoreRequest]:
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
    me: Branch, step: Step, edge: Edge, lesson: Lesson, answers: Sequence[TeacherScore]
) -> list[TrainRow]:
    """An edge's training rows: of the rollouts that its teacher has something to say about."""
    objective = me.objectives[edge.component]
    assert lesson.own is not None
    taught = lesson.taught
    if not taught:
        return []
    rollouts, own = [lesson.rollouts[i] for i in taught], [lesson.own[i] for i in taught]
    if me.config.opd.max_teacher_lag:
        _note_versions(me, edge, rollouts, answers)
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


def _note_versions(
    me: Branch, edge: Edge, rollouts: Sequence[Rollout], answers: Sequence[TeacherScore]
) -> None:
    """How many updates of the student old its samples are, and which of the teacher's weights scored them."""
    ages = [me.actor.version - rollout.weight_version for rollout in rollouts]
    me.metrics.mean(f"copd/sample_lag/{edge.name}", float(sum(ages)), len(ages))
    me.metrics.value(f"copd/teacher_version/{edge.name}", float(answers[0].weight_version))


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
