"""On-policy distillation by the distribution over k ids, with the rest of the vocabulary as one outcome.

8 k bytes a token travel between branches for the teacher's ids, as many for the student's, twice that for
their union and intersection, which need both (``planner/traffic.py``).
"""

from __future__ import annotations

from dataclasses import dataclass

from copd_megatron.config.schema import Support
from copd_megatron.objectives.base import Material, ObjectiveFactory
from copd_megatron.objectives.distribution import DistributionObjective, distribution_rows, joint_support
from copd_megatron.records import Ask, TrainRow


@dataclass(frozen=True, kw_only=True)
class TopKDistillation(DistributionObjective):
    """The objective of an edge: ``opd.distribution`` on k ids."""

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


OBJECTIVE: ObjectiveFactory = TopKDistillation
