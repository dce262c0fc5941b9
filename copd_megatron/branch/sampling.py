"""Prompts to graded rollouts: vLLM samples, verifiers grade where it was sampled, the branch gathers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from copd_megatron.branch.schedule import Step
from copd_megatron.branch.state import Branch
from copd_megatron.config.domains import all_domains
from copd_megatron.data.stream import split_evenly
from copd_megatron.launch.waiting import Countdown
from copd_megatron.metrics.phase_memory import phase_memory
from copd_megatron.records import Prompt, Rollout
from copd_megatron.rewards.grader import Grading
from copd_megatron.rollout.early_stop import EarlyStop
from copd_megatron.rollout.engine import Listener, SamplingSettings


def sample_and_grade(
    me: Branch,
    prompts: Sequence[Prompt],
    num_generations: int,
    step: Step,
    *,
    purpose: str = "native",
    stop: EarlyStop | None = None,
    grade: bool = True,
) -> list[Rollout]:
    """Graded rollouts of a training step, at the branch's own sampling settings.

    ``purpose`` enters the sampling seeds, so that a prompt met twice in a step is sampled differently.
    """
    rollout = me.settings.rollout
    settings = SamplingSettings(
        num_generations=num_generations,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
    )
    return sample_graded(
        me, prompts, settings, step=step.index, purpose=f"{me.name}/{purpose}", stop=stop, grade=grade
    )


def sample_graded(
    me: Branch,
    prompts: Sequence[Prompt],
    settings: SamplingSettings,
    *,
    step: int,
    purpose: str,
    stop: EarlyStop | None = None,
    grade: bool = True,
    terms: Mapping[str, float] | None = None,
    told: Countdown | None = None,
) -> list[Rollout]:
    """Samples ``prompts`` over the branch's rollout replicas, grades and gathers; collective over the branch.

    Args:
        grade: False leaves out the grading, for responses that nobody will judge here.
        terms: as for ``Grader.begin``.
        told: of every response of this rank's engine that ends.

    Returns:
        ``len(prompts) * num_generations`` rollouts in prompt order, the same on every rank. With ``stop``
        some are unfinished, and these have no grade.
    """
    assert me.engine is not None
    watch, ranks = me.world.watch, me.engine_ranks
    # the ranks of one engine hold the same samples: the first grades them, while others are still sampled
    grades_here = grade and me.engine.tp_rank == 0
    with me.grader.begin(terms) if grades_here else contextlib.nullcontext() as grading:
        with watch.operation("rollout.generate", ranks=ranks) as sampled:
            me.actor.give_memory(weights=True)
            with phase_memory(me.metrics, "sampling"):
                mine = me.engine.sample_share(
                    prompts, settings, step=step, branch=purpose, stop=stop, listener=_listener(grading, told)
                )
        me.clock.detail(f"generation_seconds/{purpose.partition('/')[2]}", time.monotonic() - sampled.started)
        with watch.operation("rewards.grade", ranks=(me.world.rank,)):
            mine = mine if grading is None else _graded(grading, mine)
    with watch.operation("rollout.gather", ranks=me.world.branch_ranks[me.name]):
        rollouts = me.engine.gather(mine, prompts, settings)
    before = 0 if stop is None else sum(r.response_length for r in stop.begun.values())
    me.num_sampled_tokens += sum(r.response_length for r in rollouts) - before
    return rollouts


@dataclass(frozen=True)
class _Counted:
    """Grading that also counts."""

    grading: Grading | None
    told: Countdown

    def add(self, rollout: Rollout) -> None:
        self.told.add()
        if self.grading is not None:
            self.grading.add(rollout)

    def poll(self) -> None:
        if self.grading is not None:
            self.grading.poll()


def _listener(grading: Grading | None, told: Countdown | None) -> Listener | None:
    return grading if told is None else _Counted(grading, told)


def _graded(grading: Grading, mine: list[Rollout]) -> list[Rollout]:
    """This rank's share with grades, of those that are finished."""
    graded = iter(grading.finish([r for r in mine if not r.unfinished and r.reward is None]))
    return [r if r.unfinished or r.reward is not None else next(graded) for r in mine]


def grade_everywhere(me: Branch, rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Grades rollouts that all ranks of the branch hold, each rank its share; collective over the branch."""
    ranks = me.world.branch_ranks[me.name]
    mine = split_evenly(rollouts, ranks.index(me.world.rank), len(ranks))
    with me.world.watch.operation("rewards.grade", ranks=(me.world.rank,)):
        rewards = [r.reward for r in me.grader.grade(mine)]
    shares = me.world.branch_gather(rewards, "rewards.gather")
    flat = [reward for share in shares for reward in share]
    return [replace(r, reward=reward) for r, reward in zip(rollouts, flat, strict=True)]


def graded_only(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """The rollouts that have a grade. The others, for which there was no time (the grader counts them), teach
    nothing, and the mean of their group is taken over the rest."""
    return [r for r in rollouts if r.reward is not None]


def rewards_of(rollouts: Sequence[Rollout]) -> list[float]:
    """The verifiers' grades, of those that have one."""
    return [r.reward for r in rollouts if r.reward is not None]


def reward_metrics(me: Branch, prefix: str, rollouts: Sequence[Rollout]) -> None:
    """Mean reward, lengths of prompts and responses and share of truncated responses, named
    ``<prefix>reward`` and so on; for prompts of pools also by pool, ``<prefix>reward/<pool>``."""
    _reward_metrics(me, prefix, "", rollouts)
    pools = {domain.name for domain in all_domains(me.config) if domain.is_pool}
    for pool in sorted(pools & {r.prompt.domain for r in rollouts}):
        _reward_metrics(me, prefix, f"/{pool}", [r for r in rollouts if r.prompt.domain == pool])


def _reward_metrics(me: Branch, prefix: str, suffix: str, rollouts: Sequence[Rollout]) -> None:
    count, rewards = len(rollouts), rewards_of(rollouts)
    me.metrics.mean(f"{prefix}reward{suffix}", sum(rewards), len(rewards))
    me.metrics.mean(f"{prefix}response_length{suffix}", sum(r.response_length for r in rollouts), count)
    me.metrics.mean(f"{prefix}prompt_length{suffix}", sum(r.prompt_length for r in rollouts), count)
    me.metrics.mean(f"{prefix}truncated_fraction{suffix}", sum(r.truncated for r in rollouts), count)
