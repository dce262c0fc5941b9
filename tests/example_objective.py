"""An objective of a user's own, in one small file: the student is drawn to its teacher's likelihood.

Its rows weigh nothing but where the teacher is confident, and its loss is the plain negative log-likelihood,
so it shares neither rows nor token loss with the built-in ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np
from torch import Tensor

from copd_megatron.objectives.base import Context, LossOutput, Material, MicroBatchRows, PreparedLoss
from copd_megatron.objectives.rows import row_of
from copd_megatron.objectives.surrogate import flatten
from copd_megatron.records import Ask, TrainRow


@dataclass(frozen=True)
class LikelyTokens:
    """Sum over tokens of weight x -log pi; the weights of a component sum to 1 over the batch."""

    def prepare(self, rows: Sequence[TrainRow]) -> PreparedLoss:
        """Every token the teacher likes counts alike."""
        total = sum(float(row.loss_mask.sum()) for row in rows)
        weights = [row.loss_mask / max(total, 1.0) for row in rows]

        def loss_of(batch: MicroBatchRows, logprobs: Tensor, entropy: Tensor) -> LossOutput:
            loss = -(flatten(batch.rows, weights, logprobs.device) * logprobs).sum()
            mask = flatten(batch.rows, [row.loss_mask for row in rows], logprobs.device)
            return LossOutput(
                loss=loss,
                terms={"likely_tokens_loss": loss.detach()},
                statistics={"num_tokens": mask.sum(), "likely_tokens": mask.sum()},
            )

        return loss_of


@dataclass(frozen=True, kw_only=True)
class Likely:
    """Tokens that the teacher finds likelier than ``threshold``."""

    threshold: float
    asks: ClassVar[Ask] = Ask(tokens=True)
    asks_own: ClassVar[Ask] = Ask()
    needs_old_logprobs: ClassVar[bool] = False

    @classmethod
    def of(cls, context: Context) -> Self:
        """Settings of the edge's own could be read here."""
        assert context.edge is not None
        return cls(threshold=float(np.log(0.01)))

    def rows(self, material: Material) -> list[TrainRow]:
        """Advantages stay 0: the loss does not read them."""
        assert material.teacher_logprobs is not None
        return [
            replace(
                row_of(rollout, material.component, np.zeros(rollout.response_length, dtype=np.float32)),
                loss_mask=(theirs > self.threshold).astype(np.float32),
            )
            for rollout, theirs in zip(material.rollouts, material.teacher_logprobs, strict=True)
        ]

    def token_loss(self) -> LikelyTokens:
        """The negative log-likelihood."""
        return LikelyTokens()


OBJECTIVE = Likely
