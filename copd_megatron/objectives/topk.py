"""On-policy distillation by the distribution over k ids, with the rest of the vocabulary as one outcome.

8 k bytes a token travel between branches for the teacher's ids, as many for the student's, twice that for
their union and intersection, which need both (``planner/traffic.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from copd_megatron.config.schema import DistributionConfig, LossConfig, Support
from copd_megatron.objectives.base import Context, Material, ObjectiveFactory, TokenLoss
from copd_megatron.objectives.distribution import (
    DistributionLoss,
    distribution_rows,
    joint_support,
    measure_of,
)
from copd_megatron.records import Ask, TrainRow


@dataclass(frozen=True, kw_only=True)
class TopKDistillation:
    """The objective of an edge: ``opd.distribution`` on k ids."""

    beta: float
    config: DistributionConfig
    temperature: float
    loss: LossConfig
    max_new_tokens: int

    @classmethod
    def of(cls, context: Context) -> Self:
        """From the edge, ``opd.distribution``, ``opd.teacher_temperature`` and ``loss``."""
        assert context.edge is not None, "topk is the objective of an edge"
        return cls(
            beta=context.edge.beta,
            config=context.config.opd.distribution,
            temperature=context.config.opd.teacher_temperature,
            loss=context.config.loss,
            max_new_tokens=context.settings.rollout.max_new_tokens,
        )

    @property
    def asks(self) -> Ask:
        """The teacher's own ids, its opinion of the student's, or both."""
        return Ask(
            tokens=True,
            top_k=0 if self.config.support is Support.student else self.config.top_k,
            support=self.config.support is not Support.teacher,
            entropy=self.config.entropy_threshold is not None,
            temperature=self.temperature,
        )

    @property
    def asks_own(self) -> Ask:
        """The student's ids, unless only the teacher's count."""
        return Ask(top_k=0 if self.config.support is Support.teacher else self.config.top_k)

    @property
    def needs_old_logprobs(self) -> bool:
        """For the share of the gradient budget."""
        return True

    def rows(self, material: Material) -> list[TrainRow]:
        """See ``distribution_rows``."""
        own, theirs, on_own = material.own_top, material.teacher_top, material.teacher_on_support
        joint = [
            joint_support(
                None if own is None else own[i],
                None if theirs is None else theirs[i],
                None if on_own is None else on_own[i],
                self.config.support,
            )
            for i in range(len(material.rollouts))
        ]
        supports, targets = [ids for ids, _ in joint], [logprobs for _, logprobs in joint]
        return distribution_rows(material, self.beta, supports, targets, self.config.entropy_threshold)

    def token_loss(self) -> TokenLoss:
        """The divergence."""
        return DistributionLoss(measure_of(self.config), self.beta, self.loss, self.max_new_tokens)


OBJECTIVE: ObjectiveFactory = TopKDistillation
