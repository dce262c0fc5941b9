"""The reliability gate: a live teacher teaches only where it is better than its student.

Early in a run teachers are no better than their students. Only a trainer whose teachers can sample knows
that at every step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from copd_megatron.branch.peers import Question, pass_rates
from copd_megatron.branch.schedule import Step
from copd_megatron.branch.state import Branch
from copd_megatron.config.graph import Edge
from copd_megatron.config.schema import Gate
from copd_megatron.objectives.calibration import opened
from copd_megatron.records import Rollout


def open_rollouts(
    me: Branch, step: Step, sampled: Mapping[Edge, Sequence[Rollout]]
) -> dict[Edge, Sequence[bool]]:
    """Which rollouts their teachers may teach on; nothing where the gate is off.

    One exchange, collective over all branches: the teachers answer the students' prompts.
    """
    options = me.config.opd.gate
    if options.scope is Gate.none:
        return {}
    edges = {edge: rollouts for edge, rollouts in sampled.items() if not edge.is_self}
    groups = {edge: _by_prompt(rollouts) for edge, rollouts in edges.items()}
    asked = {
        edge: [
            Question(
                prompt=members[0].prompt,
                num_samples=options.num_samples,
                max_new_tokens=me.settings.rollout.max_new_tokens,
            )
            for members in prompts.values()
        ]
        for edge, prompts in groups.items()
    }
    rates = pass_rates(me, step, asked, options.correct_reward)
    decided: dict[Edge, Sequence[bool]] = {}
    for edge, rollouts in edges.items():
        mine = [_pass_rate(members, options.correct_reward) for members in groups[edge].values()]
        is_open = opened(rates[edge], mine, options)
        me.metrics.mean(f"copd/gate_open/{edge.name}", float(is_open.sum()), len(is_open))
        me.metrics.mean(f"copd/teacher_pass_rate/{edge.name}", float(np.sum(rates[edge])), len(is_open))
        by_prompt = dict(zip(groups[edge], is_open.tolist(), strict=True))
        decided[edge] = [by_prompt[rollout.prompt.group_id] for rollout in rollouts]
    return decided


def _by_prompt(rollouts: Sequence[Rollout]) -> dict[str, list[Rollout]]:
    groups: dict[str, list[Rollout]] = defaultdict(list)
    for rollout in rollouts:
        groups[rollout.prompt.group_id].append(rollout)
    return groups


def _pass_rate(rollouts: Sequence[Rollout], least: float) -> float:
    return float(np.mean([r.reward is not None and r.reward >= least for r in rollouts]))
