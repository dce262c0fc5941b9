"""On-policy distillation by the distribution over the whole vocabulary (Eq. 3 with ``forward_kl``).

Exact, and dear: 4 bytes for each vocabulary entry at each token travel between branches and are held until
the update. For small vocabularies, and to see what ``topk`` loses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from copd_megatron.objectives.base import Material, ObjectiveFactory
from copd_megatron.objectives.distribution import DistributionObjective, distribution_rows
from copd_megatron.records import Ask, TrainRow


@dataclass(frozen=True, kw_only=True)
class FullDistillation(DistributionObjective):
    """The objective of an edge: ``opd.distribution`` over the vocabulary."""

    asks_own: ClassVar[Ask] = Ask()

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


OBJECTIVE: ObjectiveFactory = FullDistillation
