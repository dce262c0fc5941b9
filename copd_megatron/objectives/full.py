"""On-policy distillation by the distribution over the whole vocabulary (Eq. 3 with ``forward_kl``).

Exact, and dear: 4 bytes for each vocabulary entry at each token travel between branches and are held until
the update. For small vocabularies, and to see what ``topk`` loses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from copd_megatron.config.schema import DistributionConfig, LossConfig
from copd_megatron.objectives.base import Context, Material, ObjectiveFactory, TokenLoss
from copd_megatron.objectives.distribution import DistributionLoss, distribution_rows, measure_of
from copd_megatron.records import Ask, TrainRow


@dataclass(frozen=True, kw_only=True)
class FullDistillation:
    """The objective of an edge: ``opd.distribution`` over the vocabulary."""

    beta: float
    config: DistributionConfig
    temperature: float
    loss: LossConfig
    max_new_tokens: int
    asks_own: ClassVar[Ask] = Ask()
    needs_old_logprobs: ClassVar[bool] = True

    @classmethod
    def of(cls, context: Context) -> Self:
        """From the edge, ``opd.distribution``, ``opd.teacher_temperature`` and ``loss``."""
        assert context.edge is not None, "full is the objective of an edge"
        return cls(
            beta=context.edge.beta,
            config=context.config.opd.distribution,
            temperature=context.config.opd.teacher_temperature,
            loss=context.config.loss,
            max_new_tokens=context.settings.rollout.max_new_tokens,
        )

    @property
    def asks(self) -> Ask:
        """Everything, everywhere."""
        threshold = self.config.entropy_threshold
        return Ask(tokens=True, everywhere=True, entropy=threshold is not None, temperature=self.temperature)

    def rows(self, material: Material) -> list[TrainRow]:
        """See ``distribution_rows``."""
        assert material.teacher_distributions is not None, "the objective asked for them"
        return distribution_rows(
            material,
            self.beta,
            [None] * len(material.rollouts),
            material.teacher_distributions,
            self.config.entropy_threshold,
        )

    def token_loss(self) -> TokenLoss:
        """The divergence."""
        return DistributionLoss(measure_of(self.config), self.beta, self.loss, self.max_new_tokens)


OBJECTIVE: ObjectiveFactory = FullDistillation
