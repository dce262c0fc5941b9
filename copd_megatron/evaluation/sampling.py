"""Samples and grades prompts with an engine outside training, all ranks of the job together."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from copd_megatron.records import Prompt, Rollout
from copd_megatron.rewards.grader import Grader
from copd_megatron.rollout.engine import RolloutEngine, SamplingSettings


def sample_graded(
    engine: RolloutEngine,
    grader: Grader,
    prompts: Sequence[Prompt],
    settings: SamplingSettings,
    *,
    branch: str,
) -> list[Rollout]:
    """Graded responses to all prompts, the same on all ranks; graded while others are still sampled.

    ``branch`` enters the sampling seeds. Afterwards the engine's cache of prompts is empty, so that what came
    before does not matter.

    Raises as ``Grader.grade`` does.
    """
    # the ranks of one engine hold the same samples: the first grades them
    with grader.begin() if engine.tp_rank == 0 else contextlib.nullcontext() as grading:
        mine = engine.sample_share(prompts, settings, step=0, branch=branch, listener=grading)
        graded = mine if grading is None else grading.finish(mine)
    rollouts = engine.gather(graded, prompts, settings)
    engine.llm.reset_prefix_cache()
    return rollouts
