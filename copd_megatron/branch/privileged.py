"""Teachers that read more than their students (OPCoD, SDPO): who reads what, and the rows that they score.

The student answers the plain prompt. Its teacher, which may be the student itself, scores the same response
behind a prompt that also holds a correct response of the student to that prompt, a peer's feedback on the
response, or both. A response for which there is neither is left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from copd_megatron.branch.peers import Question, as_answer, ask_to_write, pass_rates
from copd_megatron.branch.sampling import grade_everywhere
from copd_megatron.branch.schedule import Step
from copd_megatron.branch.state import Branch
from copd_megatron.config.graph import Edge
from copd_megatron.config.schema import Privilege
from copd_megatron.data.seeds import sample_seed
from copd_megatron.opd.privilege import context_text, names_a_concept, others_correct, without_answer
from copd_megatron.records import IntArray, Rollout

Sampled = Mapping[Edge, Sequence[Rollout]]


def privileged_prompts(me: Branch, step: Step, sampled: Sampled) -> dict[Edge, list[IntArray | None]]:
    """The prompts that the teachers of edges with a context read, [P'] for each rollout; None where there is
    nothing more to read. Collective over all branches where peers give feedback."""
    feedback: dict[Edge, list[str]] = {}
    if any(edge.peer for edge in me.graph.edges):
        feedback = _feedback(me, step, sampled)
    return {
        edge: _prompts(me, step, edge, rollouts, feedback.get(edge, [""] * len(rollouts)))
        for edge, rollouts in sampled.items()
        if edge.context is not Privilege.none
    }


def _prompts(
    me: Branch, step: Step, edge: Edge, rollouts: Sequence[Rollout], feedback: Sequence[str]
) -> list[IntArray | None]:
    """Every rollout's privileged prompt, as far as it fits the context."""
    options, limit = me.config.opd.feedback, me.config.model.max_sequence_tokens
    prompts: list[IntArray | None] = []
    solutions = _solutions(me, step, edge, rollouts)
    for rollout, solution, comment in zip(rollouts, solutions, feedback, strict=True):
        prompt = None
        if solution is not None or comment:
            text = context_text(options.context_prompt, solution=solution, feedback=comment or None)
            prompt = me.splicer.splice(rollout.prompt.token_ids, text)
            prompt = prompt if len(prompt) + rollout.response_length <= limit else None
        prompts.append(prompt)
    have = sum(prompt is not None for prompt in prompts)
    me.metrics.mean(f"copd/privileged_fraction/{edge.name}", float(have), len(prompts))
    return prompts


def _solutions(me: Branch, step: Step, edge: Edge, rollouts: Sequence[Rollout]) -> list[str | None]:
    """For every rollout, another correct one of its group, drawn at random; None where there is none."""
    least = me.config.opd.feedback.correct_reward
    rng = np.random.default_rng(sample_seed(me.config.run.seed, me.name, step.index, f"{edge.name}/own", 0))
    solutions: list[str | None] = [None] * len(rollouts)
    for members in _groups(rollouts):
        correct = [_passed(rollouts[i], least) for i in members]
        for place, i in enumerate(members):
            others = others_correct(correct, place)
            if others:
                solutions[i] = rollouts[members[int(rng.choice(others))]].text
    return solutions


def _feedback(me: Branch, step: Step, sampled: Sampled) -> dict[Edge, list[str]]:
    """A peer's feedback on every rollout, "" where there is none. Two exchanges, collective over all
    branches: the peer's own attempts at the prompts, then its feedback where they pass."""
    options = me.config.opd.feedback
    edges = [edge for edge in sampled if edge.peer]
    attempts: dict[Edge, list[Question]] = {}
    for edge in edges:
        assert edge.peer is not None
        attempts[me.graph.link(me.name, edge.peer)] = [
            Question(
                prompt=sampled[edge][members[0]].prompt,
                num_samples=options.gate_samples,
                max_new_tokens=me.settings.rollout.max_new_tokens,
            )
            for members in _groups(sampled[edge])
        ]
    rates = pass_rates(me, step, attempts, options.correct_reward)
    asked: dict[Edge, list[int]] = {}
    questions: dict[Edge, list[Question]] = {}
    for edge in edges:
        assert edge.peer is not None
        link = me.graph.link(me.name, edge.peer)
        is_open = [rate >= options.gate_pass_rate for rate in rates[link]]
        me.metrics.mean(f"copd/gate_open/{edge.name}", float(sum(is_open)), len(is_open))
        groups = _groups(sampled[edge])
        asked[edge] = [i for members, opened in zip(groups, is_open, strict=True) if opened for i in members]
        questions[link] = [_about(me, sampled[edge][i]) for i in asked[edge]]
    answers = ask_to_write(me, step, questions, "feedback")
    feedback = {}
    for edge in edges:
        assert edge.peer is not None
        said = [me.splicer.text(samples[0]) for samples in answers[me.graph.link(me.name, edge.peer)]]
        feedback[edge] = _kept(me, edge, sampled[edge], dict(zip(asked[edge], said, strict=True)))
    return feedback


def _about(me: Branch, rollout: Rollout) -> Question:
    """The tutor's prompt: the problem, the attempt, and what is wanted."""
    options = me.config.opd.feedback
    text = options.tutor_prompt.replace("{attempt}", rollout.text)
    prompt = replace(rollout.prompt, token_ids=me.splicer.splice(rollout.prompt.token_ids, text))
    room = me.config.model.max_sequence_tokens - len(prompt.token_ids)
    if room < options.max_new_tokens and rollout.text:  # the end of a long attempt is what can be spared
        return _about(me, replace(rollout, text=rollout.text[: len(rollout.text) // 2]))
    if room < 1:  # the tutor's instructions have no room either: the problem alone
        prompt, room = rollout.prompt, me.settings.rollout.max_new_tokens
    return Question(prompt=prompt, num_samples=1, max_new_tokens=min(options.max_new_tokens, room))


def _kept(me: Branch, edge: Edge, rollouts: Sequence[Rollout], said: Mapping[int, str]) -> list[str]:
    """Feedback on every rollout, without what gives the answer away or names no concept."""
    options = me.config.opd.feedback
    feedback = [""] * len(rollouts)
    stripped = 0
    for i, text in said.items():
        kept = without_answer(text, rollouts[i].prompt.answer)
        stripped += kept != text.strip()
        problem = me.splicer.text(rollouts[i].prompt.token_ids)
        feedback[i] = "" if options.require_concept and not names_a_concept(kept, problem) else kept
    told = [i for i in said if feedback[i]]
    graded = grade_everywhere(me, [as_answer(me, rollouts[i], feedback[i]) for i in told])
    for i, answer in zip(told, graded, strict=True):
        if _passed(answer, options.correct_reward):
            feedback[i] = ""
            stripped += 1
    me.metrics.mean(f"copd/feedback_stripped/{edge.name}", float(stripped), len(said))
    me.metrics.mean(f"copd/feedback_kept/{edge.name}", float(sum(map(bool, feedback))), len(said))
    return feedback


def _groups(rollouts: Sequence[Rollout]) -> list[list[int]]:
    """Indices of the rollouts of each prompt, in order."""
    groups: dict[str, list[int]] = defaultdict(list)
    for i, rollout in enumerate(rollouts):
        groups[rollout.prompt.group_id].append(i)
    return list(groups.values())


def _passed(rollout: Rollout, least: float) -> bool:
    return rollout.reward is not None and rollout.reward >= least
