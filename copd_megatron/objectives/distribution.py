"""Distillation by whole distributions: rows that carry a teacher's distribution, and their loss.

The loss of a token is beta times the divergence of the student's live distribution from the teacher's, on
the support that the row carries. ``topk.py`` and ``full.py`` say what the teacher is asked. States are those
that the student visits, as in Eq. 8; the full forward KL on them is the paper's Eq. 3.

Shape legend: ``R`` response tokens of a row, ``k`` ids of a support, ``N`` response tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from copd_megatron.config.schema import DistributionConfig, LossConfig, Support
from copd_megatron.objectives.base import (
    Context,
    LossOutput,
    Material,
    MicroBatchRows,
    PreparedLoss,
    TokenLoss,
)
from copd_megatron.objectives.denominators import component_counts, row_weights
from copd_megatron.objectives.divergence import Measure, Targets
from copd_megatron.objectives.rows import row_of
from copd_megatron.objectives.surrogate import flatten
from copd_megatron.records import FloatArray, IntArray, TopK, TrainRow


@dataclass(frozen=True)
class DistributionLoss:
    """Sum over tokens of weight x beta x divergence; components are normalised as in ``ClippedSurrogate``."""

    measure: Measure
    beta: float
    loss: LossConfig
    max_new_tokens: int

    def prepare(self, rows: Sequence[TrainRow]) -> PreparedLoss:
        """Settles denominators."""
        weights = row_weights(rows, component_counts(rows), self.loss, self.max_new_tokens)

        def loss_of(batch: MicroBatchRows, logprobs: Tensor, entropy: Tensor) -> LossOutput:
            mask = flatten(batch.rows, [row.loss_mask for row in rows], logprobs.device)
            tokens = torch.nonzero(mask).squeeze(1)
            targets = _targets([rows[row] for row in batch.rows], logprobs.device)
            values = batch.divergence(tokens, targets[tokens], self.measure)
            weight = flatten(batch.rows, weights, logprobs.device)[tokens]
            loss = self.beta * (weight * values).sum()
            return LossOutput(
                loss=loss,
                terms={"distillation_loss": loss.detach()},
                statistics={
                    "num_tokens": mask.sum(),
                    "entropy": entropy.detach()[tokens].sum(),
                    "divergence": values.detach().sum(),
                },
            )

        return loss_of


@dataclass(frozen=True, kw_only=True)
class DistributionObjective:
    """What ``topk`` and ``full`` share: their settings and their loss."""

    beta: float
    config: DistributionConfig
    temperature: float
    """Factor on the teacher's temperature."""
    loss: LossConfig
    max_new_tokens: int
    needs_old_logprobs: ClassVar[bool] = True
    """For the share of the gradient budget."""

    @classmethod
    def of(cls, context: Context) -> Self:
        """From the edge, ``opd.distribution``, ``opd.teacher_temperature`` and ``loss``."""
        assert context.edge is not None, "comparing distributions is the objective of an edge"
        return cls(
            beta=context.edge.beta,
            config=context.config.opd.distribution,
            temperature=context.config.opd.teacher_temperature,
            loss=context.config.loss,
            max_new_tokens=context.settings.rollout.max_new_tokens,
        )

    def token_loss(self) -> TokenLoss:
        """The divergence."""
        config = self.config
        measure = Measure(kind=config.divergence, alpha=config.jsd_alpha, rest=config.rest)
        return DistributionLoss(measure, self.beta, self.loss, self.max_new_tokens)


def distribution_rows(
    material: Material,
    beta: float,
    supports: Sequence[IntArray | None],
    targets: Sequence[FloatArray],
    entropy_threshold: float | None,
) -> list[TrainRow]:
    """Rows that carry a teacher's distribution.

    Their advantages are those of Eq. 8. The loss does not read them; they say how strongly the teacher pulls
    (``train/advantage_share``).

    Args:
        material: with the log-probabilities of teacher and student at the sampled tokens.
        supports: [R, k] ids of each rollout; None: the whole vocabulary.
        targets: [R, k] the teacher's log-probabilities there.
        entropy_threshold: forward KL is added where the teacher's entropy is above it; None: nowhere.

    Raises:
        ValueError: log-probabilities are missing.
    """
    if material.teacher_logprobs is None or material.old_logprobs is None:
        raise ValueError(f"{material.component}: score the rollouts with teacher and student first")
    rows = []
    for number, rollout in enumerate(material.rollouts):
        old, theirs = material.old_logprobs[number], material.teacher_logprobs[number]
        row = row_of(rollout, material.component, (beta * (theirs - old)).astype(np.float32))
        extra = None
        if entropy_threshold is not None:
            assert material.teacher_entropy is not None, "an objective that has a threshold asks for entropy"
            extra = (material.teacher_entropy[number] > entropy_threshold).astype(np.float32)
        rows.append(
            replace(
                row,
                old_logprobs=old,
                support_ids=supports[number],
                target_logprobs=targets[number],
                forward_weight=extra,
            )
        )
    return rows


def joint_support(
    own: TopK | None, theirs: TopK | None, on_own: FloatArray | None, kind: Support
) -> tuple[IntArray, FloatArray]:
    """Ids of a support [R, k'] with -1 in empty places, and the teacher's log-probabilities there.

    Args:
        own: the student's likeliest ids, [R, k]; read unless ``kind`` is ``teacher``.
        theirs: the teacher's, [R, k]; read unless ``kind`` is ``student``.
        on_own: the teacher's log-probabilities at ``own``'s ids.
    """
    if kind is Support.teacher:
        assert theirs is not None
        return theirs.ids, theirs.logprobs
    assert own is not None and on_own is not None
    if kind is Support.student:
        return own.ids, on_own
    assert theirs is not None
    if kind is Support.intersection:
        shared = (own.ids[:, :, None] == theirs.ids[:, None, :]).any(axis=2)
        return np.where(shared, own.ids, -1).astype(np.int32), on_own
    new = ~(theirs.ids[:, :, None] == own.ids[:, None, :]).any(axis=2)
    ids = np.concatenate([own.ids, np.where(new, theirs.ids, -1)], axis=1)
    return ids.astype(np.int32), np.concatenate([on_own, theirs.logprobs], axis=1)


def _targets(rows: Sequence[TrainRow], device: torch.device) -> Targets:
    """The rows' targets, flattened to [N, k]."""

    def flat(arrays: Sequence[np.ndarray | None]) -> Tensor | None:
        known = [array for array in arrays if array is not None]
        return torch.from_numpy(np.concatenate(known)).to(device) if known else None

    ids = flat([row.support_ids for row in rows])
    logprobs = flat([row.target_logprobs for row in rows])
    return Targets(
        ids=None if ids is None else ids.long(),
        logprobs=torch.zeros(0, 1, device=device) if logprobs is None else logprobs,
        forward_weight=flat([row.forward_weight for row in rows]),
    )
