"""Divergences between a student's live distribution and a teacher's, over k ids and a rest or the vocabulary.

Pure tensor functions. The gradient flows through the student's log-probabilities on the support. This is the
point: a top-k reverse KL that is summed to one number and used as an advantage is a baseline, whose expected
gradient says nothing of the teacher.

Shape legend: ``N`` tokens, ``k`` ids of a support (``V`` where it is the whole vocabulary).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from copd_megatron.config.schema import Divergence

SMALLEST_REST = 1e-6
"""Probability outside a support is taken for at least this: float32 sums of k probabilities are off by about
1e-7, and the logarithm of a rest that is rounding alone would have a huge gradient."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Targets:
    """What a teacher says of N tokens."""

    ids: Tensor | None
    """[N, k] int64, distinct within a token, -1 in empty places; None: the whole vocabulary, in order."""
    logprobs: Tensor
    """[N, k] of the teacher; empty places may hold anything finite."""
    forward_weight: Tensor | None = None
    """[N] factor on a forward KL that is added to the divergence; None: nothing is added."""

    def __getitem__(self, part: slice | Tensor) -> Targets:
        """The targets of some of the tokens."""
        extra = self.forward_weight
        return Targets(
            ids=None if self.ids is None else self.ids[part],
            logprobs=self.logprobs[part],
            forward_weight=None if extra is None else extra[part],
        )


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Which divergence is taken."""

    kind: Divergence
    alpha: float = 0.5
    """Of ``jsd``: weight of KL(teacher || mixture), and of the teacher in the mixture."""
    rest: bool = True
    """The probability outside a support is one more outcome. False: both distributions are renormalised over
    the support."""

    def on_support(self, student: Tensor, targets: Targets) -> Tensor:
        """[N] divergence in nats.

        Args:
            student: [N, k] log-probabilities at ``targets.ids``, with gradient.
            targets: with ids.
        """
        assert targets.ids is not None
        present = targets.ids >= 0
        mine, theirs = self._normalised(student, present), self._normalised(targets.logprobs, present)
        if self.rest:
            present = torch.cat([present, torch.ones_like(present[:, :1])], dim=1)
        return _sum(self._terms(mine, theirs, targets.forward_weight), present)

    def on_vocabulary(self, student: Tensor, targets: Targets) -> Tensor:
        """[N] the part of the divergence that a slice of the vocabulary adds; slices add up.

        Args:
            student: [N, v] log-probabilities on the slice, normalised over the vocabulary, with gradient.
            targets: ``logprobs`` on the same slice.
        """
        return self._terms(student, targets.logprobs, targets.forward_weight).sum(dim=1)

    def _normalised(self, logprobs: Tensor, present: Tensor) -> Tensor:
        """[N, k + 1] with the rest, or [N, k] renormalised; empty places hold finite rubbish."""
        known = logprobs.masked_fill(~present, -torch.inf)
        if self.rest:
            rest = (1.0 - known.exp().sum(dim=1, keepdim=True)).clamp(min=SMALLEST_REST).log()
            return torch.cat([logprobs, rest], dim=1)
        # a support without ids has nothing to renormalise
        total = torch.where(present.any(dim=1, keepdim=True), known, 0.0).logsumexp(dim=1, keepdim=True)
        return logprobs - total

    def _terms(self, student: Tensor, teacher: Tensor, forward_weight: Tensor | None) -> Tensor:
        """[N, k] what every outcome adds."""
        forward = teacher.exp() * (teacher - student)
        if self.kind is Divergence.forward_kl:
            terms = forward
        elif self.kind is Divergence.reverse_kl:
            terms = student.exp() * (student - teacher)
        else:
            terms = _jensen_shannon(student, teacher, self.alpha)
        return terms if forward_weight is None else terms + forward_weight[:, None] * forward


def _jensen_shannon(student: Tensor, teacher: Tensor, alpha: float) -> Tensor:
    """Generalised Jensen-Shannon divergence, outcome by outcome, with the mixture
    M = alpha p_T + (1 - alpha) p_S: alpha KL(p_T || M) + (1 - alpha) KL(p_S || M)."""
    weight = torch.tensor(alpha, dtype=student.dtype, device=student.device)
    mixture = torch.logaddexp(teacher + weight.log(), student + torch.log1p(-weight))
    return alpha * teacher.exp() * (teacher - mixture) + (1 - alpha) * student.exp() * (student - mixture)


def _sum(terms: Tensor, present: Tensor) -> Tensor:
    return torch.where(present, terms, 0.0).sum(dim=1)
