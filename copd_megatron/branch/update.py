"""One optimizer step over native and cross rows together, and the new weights into vLLM."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from copd_megatron.branch.schedule import Step
from copd_megatron.branch.state import Batch, Branch
from copd_megatron.config.schema import Balance
from copd_megatron.data.seeds import sample_seed
from copd_megatron.errors import DivergedError
from copd_megatron.metrics.phase_memory import phase_memory
from copd_megatron.objectives.base import ByComponent
from copd_megatron.objectives.shares import advantage_shares, balance_factors, mean_sizes
from copd_megatron.records import TrainRow

logger = logging.getLogger(__name__)


def update(me: Branch, step: Step, batch: Batch) -> Batch:
    """Stage of a step: trains the actor on all rows together (Alg. 1, line 12), in mini-batches if so set."""
    if me.trains and batch.rows:
        train_on(me, batch.rows, step)
    return batch


def sync(me: Branch, step: Step, batch: Batch) -> Batch:
    """Stage of a step: the new weights into vLLM."""
    sync_weights(me)
    return batch


def train_on(me: Branch, rows: Sequence[TrainRow], step: Step) -> None:
    """One update of the actor; collective over the branch."""
    ranks = me.world.branch_ranks[me.name]
    with me.world.watch.operation("update", ranks=ranks):
        if me.engine is not None:
            me.engine.sleep()
        rows = _balanced(me, rows)
        with phase_memory(me.metrics, "update"):
            _train(me, rows, step, ranks)
        me.actor.give_memory(weights=False)
    me.metrics.value("train/num_rows", float(len(rows)))
    shares = advantage_shares(rows, me.config.loss, me.settings.rollout.max_new_tokens)
    for component, share in shares.items():
        me.metrics.value(f"train/advantage_share/{component.replace(':', '/')}", share)


def _train(me: Branch, rows: Sequence[TrainRow], step: Step, ranks: Sequence[int]) -> None:
    """The mini-batches of one update."""
    token_loss = ByComponent({name: objective.token_loss() for name, objective in me.objectives.items()})
    for number, part in enumerate(_mini_batches(me, rows, step)):
        with me.world.watch.operation("policy.forward_backward", ranks=ranks):
            statistics = me.actor.forward_backward(part, token_loss)
        with me.world.watch.operation("policy.optimizer_step", ranks=ranks):
            stepped = me.actor.optimizer_step()
        _note_skipped(me, step, statistics.loss, stepped)
        me.metrics.mean("train/loss", statistics.loss)
        me.metrics.mean("train/grad_norm", stepped["grad_norm"])
        me.metrics.value("train/lr", stepped["lr"])
        if number == 0:  # later mini-batches no longer have the weights that sampled
            me.metrics.value("train/gen_kl_error", statistics.gen_kl_error)
            me.metrics.value("train/gen_logprob_error_max", statistics.max_gen_logprob_error)
        for name, total in statistics.sums.items():
            if name not in ("num_tokens", "gen_tokens", "gen_kl_error"):
                me.metrics.mean(f"train/{name}", total, statistics.sums["num_tokens"])
    me.actor.finish_update()


def _balanced(me: Branch, rows: Sequence[TrainRow]) -> Sequence[TrainRow]:
    """The rows with the component weights that ``loss.balance`` wants."""
    loss = me.config.loss
    if loss.balance is Balance.none:
        return rows
    for component, size in mean_sizes(rows).items():
        if size:
            me.first_sizes.setdefault(component, size)
    factors = balance_factors(rows, loss, me.settings.rollout.max_new_tokens, me.first_sizes)
    for component, factor in factors.items():
        me.metrics.value(f"train/balance_factor/{component.replace(':', '/')}", factor)
    return [replace(row, component_weight=row.component_weight * factors[row.component]) for row in rows]


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
    me.metrics.mean("perf/weight_sync_gb_per_second", report.loaded_bytes / 1e9 / max(report.seconds, 1e-9))
