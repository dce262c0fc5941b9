"""What branches ask each other to write: attempts at a prompt, and feedback on an attempt.

A question is a request of the router like that for scores. The branch that is asked samples with its live
weights, with seeds of its own; the branch that asks grades what comes back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from copd_megatron.branch.sampling import grade_everywhere, sample_graded
from copd_megatron.branch.schedule import Step
from copd_megatron.branch.state import Branch
from copd_megatron.config.graph import Edge
from copd_megatron.opd.records import ScoreRequest, TeacherScore
from copd_megatron.records import Ask, IntArray, Prompt, Rollout
from copd_megatron.rollout.engine import SamplingSettings


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt that another branch is to answer."""

    prompt: Prompt
    num_samples: int
    max_new_tokens: int


def ask_to_write(
    me: Branch, step: Step, questions: Mapping[Edge, Sequence[Question]], purpose: str
) -> dict[Edge, list[list[IntArray]]]:
    """One exchange of questions, answered with responses; collective over all branches.

    Args:
        questions: by link (``Graph.links``), the same on every rank of the branch.
        purpose: enters the sampling seeds.

    Returns:
        Per link and question, the token ids of its responses.
    """
    requests = {
        link: [
            ScoreRequest(
                row_id=number,
                token_ids=question.prompt.token_ids,
                prompt_length=len(question.prompt.token_ids),
                weight_version=me.actor.version,
                ask=Ask(samples=question.num_samples, max_new_tokens=question.max_new_tokens),
                media=question.prompt.media,
            )
            for number, question in enumerate(asked)
        ]
        for link, asked in questions.items()
    }
    answers = me.router.exchange(requests, lambda link, asked: _write(me, step, link, asked, purpose))
    for link in requests:
        traffic = me.router.traffic[link]
        me.metrics.total(f"copd/router_bytes/{link.name}", traffic.sent_bytes + traffic.received_bytes)
    return {link: [list(answer.samples) for answer in answers[link]] for link in requests}


def _write(
    me: Branch, step: Step, link: Edge, asked: Sequence[ScoreRequest], purpose: str
) -> list[TeacherScore]:
    """Responses to another branch's questions; collective over this branch."""
    answers: dict[int, TeacherScore] = {}
    kinds = dict.fromkeys((request.ask.samples, request.ask.max_new_tokens) for request in asked)
    for samples, longest in kinds:
        mine = [r for r in asked if (r.ask.samples, r.ask.max_new_tokens) == (samples, longest)]
        rollouts = _sampled(me, step, link, mine, purpose, samples, longest)
        for number, request in enumerate(mine):
            group = rollouts[number * samples : (number + 1) * samples]
            answers[request.row_id] = TeacherScore(
                row_id=request.row_id,
                weight_version=me.actor.version,
                samples=tuple(r.token_ids[r.prompt_length :] for r in group),
            )
    return [answers[request.row_id] for request in asked]


def _sampled(
    me: Branch,
    step: Step,
    link: Edge,
    asked: Sequence[ScoreRequest],
    purpose: str,
    num_samples: int,
    longest: int,
) -> list[Rollout]:
    rollout = me.settings.rollout
    prompts = [
        Prompt(
            prompt_id=f"{link.name}/{request.row_id}",
            domain=link.prompts,
            token_ids=request.token_ids,
            answer="",
            verifier="",
            media=request.media,
        )
        for request in asked
    ]
    settings = SamplingSettings(
        num_generations=num_samples,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        max_new_tokens=longest,
    )
    return sample_graded(
        me, prompts, settings, step=step.index, purpose=f"{me.name}/{purpose}/{link.name}", grade=False
    )


def pass_rates(
    me: Branch, step: Step, asked: Mapping[Edge, Sequence[Question]], correct_reward: float
) -> dict[Edge, list[float]]:
    """How well other branches do on prompts: per link and question, the share of attempts that pass.

    Collective over all branches. An attempt that nobody had time to grade does not pass.
    """
    answers = ask_to_write(me, step, asked, "attempts")
    attempts = [
        _as_rollout(me, question.prompt, number, ids)
        for link, questions in asked.items()
        for question, samples in zip(questions, answers[link], strict=True)
        for number, ids in enumerate(samples)
    ]
    graded = iter(grade_everywhere(me, attempts))
    rates: dict[Edge, list[float]] = {}
    for link, questions in asked.items():
        rates[link] = []
        for question in questions:
            rewards = [next(graded).reward for _ in range(question.num_samples)]
            passed = [reward is not None and reward >= correct_reward for reward in rewards]
            rates[link].append(float(np.mean(passed)))
    return rates


def _as_rollout(me: Branch, prompt: Prompt, number: int, ids: IntArray) -> Rollout:
    """Another branch's attempt, for our verifiers."""
    return Rollout(
        prompt=prompt,
        sample_index=number,
        token_ids=np.concatenate([prompt.token_ids, ids]).astype(np.int32),
        rollout_logprobs=np.zeros(len(ids), dtype=np.float32),
        text=me.splicer.text(ids),
        truncated=False,
        weight_version=me.actor.version,
        seed=0,
    )


def as_answer(me: Branch, rollout: Rollout, text: str) -> Rollout:
    """A text taken for a response to the same prompt, ungraded."""
    return replace(rollout, text=text, reward=None)
