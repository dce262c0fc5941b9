"""How alike branches are on states that the student visits (Eq. 6)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from copd_megatron.branch.schedule import Step
from copd_megatron.branch.state import Branch
from copd_megatron.config.graph import Edge
from copd_megatron.data.seeds import sample_seed
from copd_megatron.opd.behaviour import symmetric_kl, topk_overlap
from copd_megatron.opd.records import TeacherScore
from copd_megatron.policy.actor import SequenceScore
from copd_megatron.records import FloatArray, IntArray, Rollout

_STATES_PER_PROBE = 8


def _behaviour_probes(me: Branch, step: Step, native: Sequence[Rollout]) -> list[tuple[Rollout, list[int]]]:
    """Some native rollouts and response positions in them, chosen by the run seed and the step."""
    options = me.config.opd.behaviour
    if not native or not options.num_states or step.index % options.every_steps:
        return []
    rng = np.random.default_rng(sample_seed(me.config.run.seed, me.name, step.index, "behaviour", 0))
    probes, left = [], options.num_states
    for i in rng.permutation(len(native)):
        rollout = native[i]
        count = min(left, _STATES_PER_PROBE, rollout.response_length)
        states = sorted(rng.choice(rollout.response_length, size=count, replace=False).tolist())
        probes.append((rollout, states))
        left -= count
        if not left:
            break
    return probes


def _behaviour_metrics(
    me: Branch, edge: Edge, mine: Sequence[SequenceScore], theirs: Sequence[TeacherScore]
) -> None:
    if not mine:
        return
    student = torch.from_numpy(np.concatenate([s.state_logprobs for s in mine]))
    teacher = torch.from_numpy(np.concatenate([t.state_logprobs for t in theirs]))
    teacher_topk = torch.from_numpy(np.concatenate([t.topk_ids for t in theirs]))
    k = teacher_topk.shape[1]
    student_topk = torch.from_numpy(_topk_ids(student.numpy(), k))
    overlap = topk_overlap(student_topk, teacher_topk)
    pair = f"{edge.student}-{edge.teacher}"
    me.metrics.mean(f"copd/overlap@{k}/{pair}", float(overlap.sum()), len(overlap))
    me.metrics.mean(f"copd/sym_kl/{pair}", float(symmetric_kl(student, teacher).sum()), len(overlap))


def _topk_ids(state_logprobs: FloatArray, k: int) -> IntArray:
    """[S, k] most probable tokens of each state, most probable first."""
    k = min(k, state_logprobs.shape[1])
    return torch.from_numpy(state_logprobs).topk(k).indices.numpy().astype(np.int32)
