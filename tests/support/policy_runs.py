"""One actor put through scoring, training, snapshots and refusals, under any layout of ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from copd_megatron.config.schema import (
    Divergence,
    LossConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainingConfig,
)
from copd_megatron.records import TrainRow
from tests.support.actors import make_actor
from tests.support.models import reference_logprobs
from tests.support.texts import Text

if TYPE_CHECKING:
    import torch

VOCAB = 321
TEMPERATURE = 0.8
LOSS = LossConfig(entropy_coefficient=0.1, kl_coefficient=0.2)
OPTIMIZER = OptimizerConfig(lr=1e-2, weight_decay=0.1, adam_eps=1e-3, clip_grad=0.5)
NUM_STEPS = 2
TOP_K = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one rank reports."""

    scores: list[Any]
    answers: list[dict[str, np.ndarray]]
    """What is said by token of likeliest ids and of ids asked about, at another temperature."""
    distilled: tuple[Any, dict[str, float]]
    """Statistics and outcome of an update with two distribution losses beside the surrogate, left out by its
    gradient bound."""
    snapshot_scores: list[Any]
    """With the initial weights, after training."""
    snapshot_version: int
    steps: list[tuple[Any, dict[str, float]]]
    weights: dict[str, tuple[int | None, int, int, np.ndarray]]
    """After training, this rank's share: name to (dim, start, stop, values)."""
    stale_error: str
    largest_micro_batch: int
    """Padded tokens."""
    skips: SimpleNamespace
    """What became of a NaN, of a gradient above the bound, and of the update after them."""


def exercise(
    parallel: ParallelConfig,
    folder: Path,
    texts: list[Text],
    states: list[list[int]],
    rows: list[TrainRow],
    packed: bool = True,
) -> Outcome:
    """Scores, trains, scores with a snapshot, and provokes what must be refused. Runs on every rank."""
    from copd_megatron.objectives.surrogate import ClippedSurrogate

    actor = make_actor(
        parallel,
        folder,
        training=TrainingConfig(micro_batch_tokens=100, logprob_chunk_tokens=7, sequence_packing=packed),
        optimizer=OPTIMIZER,
        temperature=TEMPERATURE,
    )
    scores = actor.log_probs(texts, states)
    answers = _answers(actor, texts)
    distilled = _distilled(actor, rows)
    initial = actor.snapshot()
    steps = []
    for _ in range(NUM_STEPS):
        statistics = actor.forward_backward(rows, ClippedSurrogate(LOSS, 64))
        steps.append((_plain(statistics), actor.optimizer_step()))
    actor.version = 1
    try:
        actor.forward_backward(rows, ClippedSurrogate(LOSS, 64))
        stale = ""
    except ValueError as error:
        stale = str(error)
    weights = {}
    for slot in actor.view.local:
        start, stop = slot.range_of(actor.tp_rank, actor.view.tp_size) if slot.dim is not None else (0, 0)
        place = "copy of " + slot.name if slot.copy_of_embedding else slot.name
        weights[place] = (slot.dim, start, stop, actor.view.read(slot).clone().numpy())
    with actor.using(initial) as version:
        back = actor.log_probs(texts[:3])
    again = actor.log_probs(texts[:1])[0]
    assert not np.allclose(again.logprobs, back[0].logprobs, atol=1e-3), "the live weights came back"
    sizes = [b.input_ids_bs.numel() for b in actor._micro_batches(texts, None)]
    actor.version = 0
    return Outcome(
        skips=_skips(actor, rows),
        scores=[_plain(score) for score in scores],
        answers=answers,
        distilled=distilled,
        snapshot_scores=[_plain(score) for score in back],
        snapshot_version=version,
        steps=steps,
        weights=weights,
        stale_error=stale,
        largest_micro_batch=max(sizes),
    )


def _answers(actor: Any, texts: list[Text]) -> list[dict[str, np.ndarray]]:
    scores = actor.log_probs(texts, top_k=TOP_K, support=support_ids(texts), temperature=0.7)
    return [{"ids": s.top.ids, "logprobs": s.top.logprobs, "support": s.support_logprobs} for s in scores]


def support_ids(texts: Sequence[Text]) -> list[np.ndarray]:
    """[R, 3] ids of the whole vocabulary, some places empty."""
    rng = np.random.default_rng(8)
    ids = []
    for text in texts:
        mine = np.argsort(rng.random((text.response_length, VOCAB)))[:, :3].astype(np.int32)
        mine[rng.random(mine.shape) < 0.2] = -1
        ids.append(mine)
    return ids


def _distilled(actor: Any, rows: list[TrainRow]) -> tuple[Any, dict[str, float]]:
    """One update over rows of three components, two of which compare distributions."""
    from copd_megatron.objectives.base import ByComponent
    from copd_megatron.objectives.distribution import DistributionLoss
    from copd_megatron.objectives.divergence import Measure
    from copd_megatron.objectives.surrogate import ClippedSurrogate

    losses = {
        "native": ClippedSurrogate(LOSS, 64),
        "cross:topk": DistributionLoss(Measure(kind=Divergence.jsd), 0.7, LOSS, 64),
        "cross:full": DistributionLoss(Measure(kind=Divergence.reverse_kl), 1.3, LOSS, 64),
    }
    actor.training = dataclasses.replace(actor.training, max_grad_norm=1e-9)
    statistics = actor.forward_backward(_with_targets(rows), ByComponent(losses))
    stepped = actor.optimizer_step()
    actor.training = dataclasses.replace(actor.training, max_grad_norm=None)
    # the step that was left out took its place in the learning-rate schedule, which here is constant
    return _plain(statistics), stepped


def _with_targets(rows: Sequence[TrainRow]) -> list[TrainRow]:
    """The rows, two thirds of them with random teachers: over 4 ids, and over the vocabulary."""
    rng = np.random.default_rng(9)
    changed = []
    for i, row in enumerate(rows):
        logits = rng.normal(size=(row.response_length, VOCAB))
        teacher = (logits - np.log(np.exp(logits).sum(-1, keepdims=True))).astype(np.float32)
        ids = np.argsort(rng.random(teacher.shape))[:, :4].astype(np.int32)
        if i % 3 == 0:
            changed.append(
                dataclasses.replace(
                    row,
                    component="cross:topk",
                    support_ids=ids,
                    target_logprobs=np.take_along_axis(teacher, ids, axis=1),
                    forward_weight=(np.arange(row.response_length) % 2).astype(np.float32),
                )
            )
        elif i % 3 == 1:
            changed.append(dataclasses.replace(row, component="cross:full", target_logprobs=teacher))
        else:
            changed.append(dataclasses.replace(row, component="native"))
    return changed


def _skips(actor: Any, rows: list[TrainRow]) -> SimpleNamespace:
    """Three updates: one with a NaN in it, one above ``max_grad_norm``, a good one."""
    import torch

    from copd_megatron.objectives.surrogate import ClippedSurrogate

    def weights() -> list[torch.Tensor]:
        return [p.detach().clone() for p in actor.model.parameters()]

    def update(rows: list[TrainRow], max_grad_norm: float | None = None) -> dict[str, float]:
        actor.training = dataclasses.replace(actor.training, max_grad_norm=max_grad_norm)
        actor.forward_backward(rows, ClippedSurrogate(LOSS, 64))
        stepped: dict[str, float] = actor.optimizer_step()
        return stepped

    poisoned = dataclasses.replace(rows[1], advantages=np.full_like(rows[1].advantages, np.nan))
    before = weights()
    nan, above = update([rows[0], poisoned, *rows[2:]]), update(rows, max_grad_norm=1e-6)
    unchanged = all(torch.equal(a, b) for a, b in zip(before, weights(), strict=True))
    good = update(rows)
    return SimpleNamespace(
        nan=nan,
        above=above,
        unchanged=unchanged,
        good=good,
        changed=any(not torch.equal(a, b) for a, b in zip(before, weights(), strict=True)),
        finite=all(bool(p.isfinite().all()) for p in weights()),
    )


def _plain(record: Any) -> SimpleNamespace:
    """The same fields without the class: unpickling the class would import Megatron in pytest's process."""
    return SimpleNamespace(**vars(record))


def mixed_rows(folder: Path, texts: Sequence[Text]) -> list[TrainRow]:
    """Native and cross rows with masks, some with old log-probabilities off the policy's."""
    rng = np.random.default_rng(5)
    rows = []
    for i, text in enumerate(texts):
        length = text.response_length
        exact = reference_logprobs(folder, text.token_ids, text.prompt_length, TEMPERATURE)

        def near(exact: np.ndarray = exact, length: int = length) -> np.ndarray:
            return (exact + rng.normal(scale=0.3, size=length)).astype(np.float32)

        mask = (rng.random(length) > 0.2).astype(np.float32)
        if i == 2:
            mask[:] = 0
        rows.append(
            TrainRow(
                token_ids=text.token_ids,
                prompt_length=text.prompt_length,
                advantages=rng.normal(size=length).astype(np.float32),
                loss_mask=mask,
                component="native" if i % 3 else "cross:other",
                component_weight=1.0 if i % 3 else 0.5,
                old_logprobs=near() if i % 2 else None,
                rollout_logprobs=near(),
                reference_logprobs=near() if i % 3 else None,  # cross rows have no KL term
            )
        )
    return rows
