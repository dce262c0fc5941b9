"""The stages of a training step, from one branch's point of view.

native rows:  sample (vLLM) -> grade (verifiers) -> GRPO advantages
cross rows:   sample on a teacher's prompts -> teacher scores every token -> OPD advantages
update:       one optimizer step over native and cross rows together
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from copd_megatron.advantages import cross_rows, informative_groups, native_rows
from copd_megatron.branch import Branch
from copd_megatron.config.schema import MismatchCorrection, TeacherMode
from copd_megatron.opd.behaviour import symmetric_kl, topk_overlap
from copd_megatron.opd.graph import Edge
from copd_megatron.opd.records import ScoreRequest, TeacherScore
from copd_megatron.phase_memory import phase_memory
from copd_megatron.policy.actor import SequenceScore
from copd_megatron.records import FloatArray, IntArray, Prompt, Rollout, TrainRow
from copd_megatron.rollout.early_stop import EarlyStop, carried, continued, num_asked, split_groups
from copd_megatron.rollout.engine import SamplingSettings, sample_seed
from copd_megatron.schedule import Phase, Step

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Batch:
    """A branch's training rows of one step and the rollouts they came from."""

    native: list[Rollout] = field(default_factory=list)
    rows: list[TrainRow] = field(default_factory=list)


# ---- native: reinforcement learning with verifiable rewards (Eq. 7, 11) ---------------------------------


def native_batch(me: Branch, step: Step) -> Batch:
    """This branch's own prompts: sampled, graded, turned into GRPO rows.

    With dynamic sampling, groups whose rewards are all equal are dropped and further prompts sampled in
    their place, up to ``dynamic_sampling_max_rounds`` rounds.
    """
    if not me.trains:
        return Batch()
    assert me.prompts is not None
    options = me.config.advantage
    wanted, rollouts = me.settings.num_prompts_per_step, list[Rollout]()
    rounds = options.dynamic_sampling_max_rounds if options.dynamic_sampling else 1
    for _ in range(rounds):
        missing = wanted - len({r.prompt.prompt_id for r in rollouts})
        if missing <= 0:
            break
        fresh = _fresh_groups(me, missing, step)
        _reward_metrics(me, "train/", fresh)
        if options.dynamic_sampling:
            keep = informative_groups(_rewards(fresh), [r.prompt.prompt_id for r in fresh])
            me.metrics.mean("train/uninformative_fraction", float((~keep).sum()), len(keep))
            fresh = [r for r, kept in zip(fresh, keep, strict=True) if kept]
        rollouts += fresh
    old, reference = _start_of_step_logprobs(me, rollouts)
    rows = native_rows(
        rollouts,
        options,
        me.config.loss,
        me.settings.rollout.max_new_tokens,
        old_logprobs=old,
        reference_logprobs=reference,
    )
    # begun by earlier weights: the ratio is to what sampled each token
    rows = [
        replace(row, old_logprobs=row.rollout_logprobs)
        if row.old_logprobs is None and row.weight_version < me.actor.version
        else row
        for row in rows
    ]
    return Batch(native=rollouts, rows=rows)


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
        num_prompts=wanted, begun={(r.prompt.prompt_id, r.sample_index): r for g in begun for r in g}
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


def _start_of_step_logprobs(
    me: Branch, rollouts: Sequence[Rollout]
) -> tuple[list[FloatArray] | None, list[FloatArray] | None]:
    """Log-probabilities under the start-of-step and the reference weights, where something needs them.

    On-policy with one optimizer step a batch, the update's own forward pass gives the former.
    """
    loss = me.config.loss
    in_reward = bool(loss.kl_coefficient) and me.reference is not None
    needs_old = (
        me.config.training.num_mini_batches > 1
        or loss.mismatch_correction is not MismatchCorrection.none
        or in_reward
    )
    old = [s.logprobs for s in score(me, rollouts)] if needs_old else None
    reference = None
    if me.reference is not None:
        with me.actor.using(me.reference):
            reference = [s.logprobs for s in score(me, rollouts)]
    return old, reference


def score(
    me: Branch, sequences: Sequence[Rollout | ScoreRequest], states: Sequence[Sequence[int]] | None = None
) -> list[SequenceScore]:
    """The actor's log-probabilities, as a named operation."""
    with (
        me.world.watch.operation("policy.log_probs", ranks=me.world.branch_ranks[me.name]),
        phase_memory(me.metrics, "scoring"),
    ):
        return me.actor.log_probs(sequences, states)


# ---- cross: on-policy distillation between branches (Eq. 8) ---------------------------------------------


def cross_batch(me: Branch, step: Step, native: Sequence[Rollout]) -> list[TrainRow]:
    """Exchanges with the other branches; returns the cross rows of this branch.

    In Phase II, for every edge into this branch: sample on the edge's prompts, score with my own weights,
    have the teacher score, and make token advantages beta * delta. In every phase, behaviour is measured on
    a few of my native rollouts. Collective over all branches.
    """
    _refresh_teacher(me, step)
    rollouts: dict[Edge, list[Rollout]] = {}
    if step.phase is Phase.opd:
        for edge in me.graph.into(me.name):
            prompts = me.edge_prompts[edge].next(edge.num_prompts)
            rollouts[edge] = sample_and_grade(me, prompts, edge.num_generations, step, purpose=edge.name)
            _reward_metrics(me, f"cross/{edge.teacher}/", rollouts[edge])
    probes = _behaviour_probes(me, step, native)
    requests = {
        edge: [_request(i, r, ()) for i, r in enumerate(rollouts.get(edge, []))]
        + [_request(-1 - i, r, states) for i, (r, states) in enumerate(probes)]
        for edge in me.graph.into(me.name)
    }
    mine = {edge: score(me, rollouts[edge]) for edge in rollouts}
    probed = score(me, [r for r, _ in probes], [states for _, states in probes]) if probes else []
    begin = time.perf_counter()
    theirs = me.router.exchange(requests, lambda edge, wanted: teach(me, wanted, step))
    me.metrics.maximum("timing/exchange_seconds", time.perf_counter() - begin)
    if me.media is not None:
        me.media.drop_encoded()
    for edge in requests:
        traffic = me.router.traffic[edge]
        me.metrics.total(f"copd/router_bytes/{edge.name}", traffic.sent_bytes + traffic.received_bytes)
    rows: list[TrainRow] = []
    for edge, sampled in rollouts.items():
        scores = theirs[edge][: len(sampled)]
        rows += cross_rows(
            sampled,
            [s.logprobs for s in scores],
            [s.logprobs for s in mine[edge]],
            teacher=edge.teacher,
            beta=edge.beta,
            delta_clip=me.config.opd.delta_clip,
        )
        gap = np.concatenate([t.logprobs - s.logprobs for t, s in zip(scores, mine[edge], strict=True)])
        me.metrics.mean(f"copd/teacher_gap/{edge.name}", float(gap.sum()), len(gap))
    for edge in requests:
        _behaviour_metrics(me, edge, probed, theirs[edge][len(rollouts.get(edge, [])) :])
    return rows


def teach(me: Branch, requests: Sequence[ScoreRequest], step: Step) -> list[TeacherScore]:
    """Scores another branch's rows with the weights that this branch teaches with in Phase II (in Phase I,
    where only behaviour is measured, with the live ones)."""
    begin = time.perf_counter()
    with me.actor.using(me.teacher if step.phase is Phase.opd else None) as version:
        scores = score(me, requests, [r.state_positions.tolist() for r in requests])
    me.metrics.maximum("timing/teaching_seconds", time.perf_counter() - begin)
    return [
        TeacherScore(
            row_id=request.row_id,
            logprobs=s.logprobs,
            weight_version=version,
            topk_ids=_topk_ids(s.state_logprobs, me.config.opd.behaviour.top_k),
            state_logprobs=s.state_logprobs,
        )
        for request, s in zip(requests, scores, strict=True)
    ]


def _refresh_teacher(me: Branch, step: Step) -> None:
    """Takes the snapshot this branch teaches with, when the teacher mode says so (before any update)."""
    if step.phase is not Phase.opd or not me.trains:
        return
    mode, opd = me.config.opd.teacher_mode, me.config.opd
    due = step.index_in_phase == 0
    if mode is TeacherMode.every_n_steps:
        due = due or step.index_in_phase % opd.snapshot_every_steps == 0
    if mode is not TeacherMode.live and due:
        me.teacher = me.actor.snapshot(into=me.teacher)


def _request(row_id: int, rollout: Rollout, states: Sequence[int]) -> ScoreRequest:
    return ScoreRequest(
        row_id=row_id,
        token_ids=rollout.token_ids,
        prompt_length=rollout.prompt_length,
        weight_version=rollout.weight_version,
        state_positions=np.asarray(states, dtype=np.int32),
        media=rollout.media,
    )


# ---- behaviour: how alike branches are on student-visited states (Eq. 6) --------------------------------

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


# ---- update ---------------------------------------------------------------------------------------------


def update(me: Branch, rows: Sequence[TrainRow], step: Step) -> None:
    """One training step of the actor: native and cross rows together, in one or more mini-batches."""
    if not me.trains or not rows:
        return
    if me.engine is not None:
        me.engine.sleep()
    begin = time.perf_counter()
    ranks = me.world.branch_ranks[me.name]
    with phase_memory(me.metrics, "update"):
        _train(me, rows, step, ranks)
    me.actor.give_memory(weights=False)
    me.metrics.maximum("timing/update_seconds", time.perf_counter() - begin)
    me.metrics.value("train/num_rows", float(len(rows)))


def _train(me: Branch, rows: Sequence[TrainRow], step: Step, ranks: Sequence[int]) -> None:
    """The mini-batches of one update."""
    for number, part in enumerate(_mini_batches(me, rows, step)):
        with me.world.watch.operation("policy.forward_backward", ranks=ranks):
            statistics = me.actor.forward_backward(
                part, me.config.loss, max_new_tokens=me.settings.rollout.max_new_tokens
            )
        with me.world.watch.operation("policy.optimizer_step", ranks=ranks):
            stepped = me.actor.optimizer_step()
        _note_skipped(me, step, statistics.loss, stepped)
        me.metrics.mean("train/loss", statistics.loss)
        me.metrics.mean("train/grad_norm", stepped["grad_norm"])
        me.metrics.value("train/lr", stepped["lr"])
        if number == 0:  # later mini-batches no longer have the weights that sampled
            me.metrics.value("train/gen_kl_error", statistics.mean("gen_kl_error"))
            me.metrics.value("train/gen_logprob_error_max", statistics.max_gen_logprob_error)
        for name, total in statistics.sums.items():
            if name not in ("num_tokens", "gen_kl_error"):
                me.metrics.mean(f"train/{name}", total, statistics.sums["num_tokens"])
    me.actor.finish_update()


class DivergedError(RuntimeError):
    """Too many updates in a row had to be skipped."""


def _note_skipped(me: Branch, step: Step, loss: float, stepped: Mapping[str, float]) -> None:
    """Counts and reports an update that was left out; ends the run where there are too many in a row.

    Raises:
        DivergedError: more than ``training.max_skipped_updates``; the same on every rank of the branch.
    """
    me.metrics.total("train/skipped_updates", stepped["skipped"] if me.world.is_branch_first else 0.0)
    if not stepped["skipped"]:
        me.num_skipped_updates = 0
        return
    me.num_skipped_updates += 1
    training = me.config.training
    what = (
        f"branch {me.name}, step {step.index + 1}: update skipped, gradient norm {stepped['grad_norm']:g}, "
        f"loss {loss:g} (training.max_grad_norm={training.max_grad_norm}); the weights stay as they "
        f"were; {me.num_skipped_updates} in a row"
    )
    if me.num_skipped_updates > training.max_skipped_updates:
        raise DivergedError(
            f"{what}, more than training.max_skipped_updates={training.max_skipped_updates}: the run has "
            "diverged; go on from an earlier checkpoint with a lower optimizer.lr, or look at the data"
        )
    if me.world.is_branch_first:
        logger.warning("%s", what)


def _mini_batches(me: Branch, rows: Sequence[TrainRow], step: Step) -> list[list[TrainRow]]:
    """The rows in ``num_mini_batches`` parts; each part has its share of every component."""
    count = me.config.training.num_mini_batches
    if count == 1:
        return [list(rows)]
    rng = np.random.default_rng(sample_seed(me.config.run.seed, me.name, step.index, "mini_batches", 0))
    parts: list[list[TrainRow]] = [[] for _ in range(count)]
    for component in dict.fromkeys(row.component for row in rows):
        members = [row for row in rows if row.component == component]
        for place, i in enumerate(rng.permutation(len(members))):
            parts[place % count].append(members[i])
    return [part for part in parts if part]


def sync_weights(me: Branch) -> None:
    """The new weights into vLLM, live."""
    if me.sync is None:
        return
    with (
        me.world.watch.operation("weight_sync", ranks=me.world.branch_ranks[me.name]),
        phase_memory(me.metrics, "weight_sync"),
    ):
        report = me.sync()
    me.metrics.maximum("timing/weight_sync_seconds", report.seconds)
    me.metrics.mean("perf/weight_sync_gb_per_second", report.loaded_bytes / 1e9 / max(report.seconds, 1e-9))


# ---- what a step's rollouts looked like ------------------------------------------------------------------


def _rewards(rollouts: Sequence[Rollout]) -> list[float]:
    return [r.reward if r.reward is not None else 0.0 for r in rollouts]


def _reward_metrics(me: Branch, prefix: str, rollouts: Sequence[Rollout]) -> None:
    count = len(rollouts)
    me.metrics.mean(f"{prefix}reward", sum(_rewards(rollouts)), count)
    me.metrics.mean(f"{prefix}response_length", sum(r.response_length for r in rollouts), count)
    me.metrics.mean(f"{prefix}truncated_fraction", sum(r.truncated for r in rollouts), count)
