"""Prompts to graded rollouts: vLLM samples, verifiers grade, the branch gathers."""

from __future__ import annotations

import time
from collections.abc import Sequence

from copd_megatron.branch.schedule import Step
from copd_megatron.branch.state import Branch
from copd_megatron.metrics.phase_memory import phase_memory
from copd_megatron.records import Prompt, Rollout
from copd_megatron.rollout.early_stop import EarlyStop, carried, continued, num_asked, split_groups
from copd_megatron.rollout.engine import SamplingSettings


def _fresh_groups(me: Branch, wanted: int, step: Step) -> list[Rollout]:
    """All responses to ``wanted`` prompts; with over-sampling, to those that are done first."""
    assert me.prompts is not None
    count, options = me.settings.num_generations_per_prompt, me.settings.rollout
    if not options.over_sampling:
        return sample_and_grade(me, me.prompts.next(wanted), count, step)
    asked = num_asked(wanted, options.over_sampling)
    lag = me.config.training.max_weight_lag
    begun = carried(me.begun, version=me.actor.version, max_lag=lag)[:asked]
    prompts = continued(me.prompts.next(asked - len(begun)), begun)
    stop = EarlyStop(
        num_prompts=wanted, begun={(r.prompt.group_id, r.sample_index): r for g in begun for r in g}
    )
    rollouts = sample_and_grade(me, prompts, count, step, stop=stop)
    complete, left = split_groups(rollouts, count, wanted)
    me.begun = left if options.partial_rollouts else []
    me.metrics.value("train/carried_prompts", float(len(begun)))
    me.metrics.value("train/unfinished_prompts", float(len(left)))
    return complete


def sample_and_grade(
    me: Branch,
    prompts: Sequence[Prompt],
    num_generations: int,
    step: Step,
    *,
    purpose: str = "native",
    stop: EarlyStop | None = None,
) -> list[Rollout]:
    """Samples with the branch's weights and grades each response where it was sampled.

    ``purpose`` enters the sampling seeds, so that a prompt met twice in a step is sampled differently.
    """
    rollout = me.settings.rollout
    settings = SamplingSettings(
        num_generations=num_generations,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
    )
    return sample_graded(me, prompts, settings, step=step.index, purpose=f"{me.name}/{purpose}", stop=stop)


def sample_graded(
    me: Branch,
    prompts: Sequence[Prompt],
    settings: SamplingSettings,
    *,
    step: int,
    purpose: str,
    stop: EarlyStop | None = None,
) -> list[Rollout]:
    """``prompts`` sampled over the branch's rollout replicas, graded, and gathered on every rank. With
    ``stop``, not all are finished, and those that are not have no grade."""
    assert me.engine is not None
    me.actor.give_memory(weights=True)
    begin = time.perf_counter()
    watch, ranks = me.world.watch, me.engine_ranks
    with watch.operation("rollout.generate", ranks=ranks), phase_memory(me.metrics, "sampling"):
        mine = me.engine.sample_share(prompts, settings, step=step, branch=purpose, stop=stop)
    generated = time.perf_counter()
    with watch.operation("rewards.grade", ranks=(me.world.rank,)):
        # the ranks of one engine hold the same samples; the first speaks for all
        if me.engine.tp_rank == 0:
            graded = iter(me.grader.grade([r for r in mine if not r.unfinished and r.reward is None]))
            mine = [r if r.unfinished or r.reward is not None else next(graded) for r in mine]
    graded_at = time.perf_counter()
    with watch.operation("rollout.gather", ranks=me.world.branch_ranks[me.name]):
        rollouts = me.engine.gather(mine, prompts, settings)
    me.metrics.maximum("timing/generation_seconds", generated - begin)
    me.metrics.maximum("timing/grading_seconds", graded_at - generated)
    before = 0 if stop is None else sum(r.response_length for r in stop.begun.values())
    me.num_sampled_tokens += sum(r.response_length for r in rollouts) - before
    return rollouts


def _rewards(rollouts: Sequence[Rollout]) -> list[float]:
    return [r.reward if r.reward is not None else 0.0 for r in rollouts]


def _reward_metrics(me: Branch, prefix: str, rollouts: Sequence[Rollout]) -> None:
    count = len(rollouts)
    me.metrics.mean(f"{prefix}reward", sum(_rewards(rollouts)), count)
    me.metrics.mean(f"{prefix}response_length", sum(r.response_length for r in rollouts), count)
    me.metrics.mean(f"{prefix}truncated_fraction", sum(r.truncated for r in rollouts), count)
