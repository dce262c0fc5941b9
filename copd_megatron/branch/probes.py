"""How alike branches are on states that the student visits: top-k overlap (Eq. 6) and symmetric KL."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from copd_megatron.branch.lessons import Probe
from copd_megatron.branch.schedule import Step, probes_due
from copd_megatron.branch.scoring import score
from copd_megatron.branch.state import Branch
from copd_megatron.config.graph import Edge
from copd_megatron.data.seeds import sample_seed
from copd_megatron.opd.behaviour import symmetric_kl, topk_overlap
from copd_megatron.opd.records import TeacherScore
from copd_megatron.policy.actor import SequenceScore
from copd_megatron.records import Ask, Rollout

_STATES_PER_PROBE = 8


def choose_probes(me: Branch, step: Step, visited: Sequence[Rollout]) -> list[Probe]:
    """Some of the rollouts and response positions in them, chosen by the run seed and the step."""
    options = me.config.opd.behaviour
    if not visited or not probes_due(me.config, step):
        return []
    rng = np.random.default_rng(sample_seed(me.config.run.seed, me.name, step.index, "behaviour", 0))
    probes, left = [], options.num_states
    for i in rng.permutation(len(visited)):
        rollout = visited[i]
        count = min(left, _STATES_PER_PROBE, rollout.response_length)
        positions = sorted(rng.choice(rollout.response_length, size=count, replace=False).tolist())
        probes.append(Probe(rollout=rollout, ask=Ask(positions=tuple(positions))))
        left -= count
        if not left:
            break
    return probes


def score_probes(me: Branch, probes: Sequence[Probe]) -> list[SequenceScore]:
    """What this branch itself says at the probes' positions."""
    if not probes:
        return []
    return score(me, [p.rollout for p in probes], [p.ask.positions for p in probes])


def behaviour_metrics(
    me: Branch, edge: Edge, mine: Sequence[SequenceScore], theirs: Sequence[TeacherScore]
) -> None:
    """Overlap and symmetric KL of an edge's student and teacher. Nothing where there are no probes."""
    if not mine:
        return
    student = torch.from_numpy(np.concatenate([s.state_logprobs for s in mine]))
    teacher = torch.from_numpy(np.concatenate([t.distributions for t in theirs]))
    k = min(me.config.opd.behaviour.top_k, student.shape[1])
    overlap = topk_overlap(student.topk(k).indices, teacher.topk(k).indices)
    pair = f"{edge.student}-{edge.teacher}"
    me.metrics.mean(f"copd/overlap@{k}/{pair}", float(overlap.sum()), len(overlap))
    me.metrics.mean(f"copd/sym_kl/{pair}", float(symmetric_kl(student, teacher).sum()), len(overlap))
