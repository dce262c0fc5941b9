"""What an objective is: how one component of the loss is made.

A branch's rows come in components: its own (``native``), and one for each teacher (``cross:<teacher>``). Each
component has an objective, which says three things:

1. ``asks``: what it wants to know from the teacher about every response. It travels as data (``Ask``).
2. ``rows``: how rollouts, and what was said of them, become training rows with per-token streams.
3. ``token_loss``: the differentiable loss of these rows' tokens.

The actor runs the token loss over micro-batches and knows no objective by name. ``README.md`` beside this
file shows how to write one.

Shape legend: ``R`` response tokens of a row, ``V`` vocabulary, ``N`` response tokens of a micro-batch,
flattened, ``m`` some of these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from copd_megatron.config.graph import Edge
from copd_megatron.config.schema import BranchConfig, Config
from copd_megatron.objectives.divergence import Measure, Targets
from copd_megatron.records import Ask, FloatArray, Rollout, TopK, TrainRow


@dataclass(frozen=True, kw_only=True)
class Context:
    """What an objective is built from: the run's settings, and whose rows it makes."""

    config: Config
    branch: str
    """The branch that learns."""
    edge: Edge | None = None
    """The edge whose rows it makes; None: the branch's own."""

    @property
    def settings(self) -> BranchConfig:
        """The learning branch's section."""
        return self.config.branches[self.branch]


@dataclass(frozen=True, kw_only=True)
class Material:
    """One component's rollouts and all that was said of them, in the same order."""

    rollouts: Sequence[Rollout]
    component: str
    """Name that the rows get."""
    old_logprobs: Sequence[FloatArray] | None = None
    """[R] each, under the learning branch's actor as it sampled them; None: not computed."""
    reference_logprobs: Sequence[FloatArray] | None = None
    """[R] each, under the base model; None: there is no KL term."""
    teacher_logprobs: Sequence[FloatArray] | None = None
    """[R] each, under the teacher; None: no teacher was asked for them."""
    own_top: Sequence[TopK] | None = None
    """[R, k] each, the learning branch's likeliest ids as it sampled them (``asks_own.top_k``)."""
    teacher_top: Sequence[TopK] | None = None
    """[R, k] each, the teacher's likeliest ids (``asks.top_k``)."""
    teacher_on_support: Sequence[FloatArray] | None = None
    """[R, k] each, the teacher's log-probabilities at the ids of ``own_top`` (``asks.support``)."""
    teacher_distributions: Sequence[FloatArray] | None = None
    """[R, V] each (``asks.everywhere``)."""
    teacher_entropy: Sequence[FloatArray] | None = None
    """[R] each, in nats (``asks.entropy``)."""
    shift: Sequence[float] | None = None
    """Added to every token's log pi_teacher - log pi_student of each rollout; None: nothing is."""
    seed: int = 0
    """Of what is drawn at random: from run seed, branch, step and component."""


@dataclass(frozen=True, kw_only=True)
class LossOutput:
    """Loss of a micro-batch with what to log about it. Everything adds up over micro-batches and ranks."""

    loss: Tensor
    """Scalar, with gradient: the sum of ``terms``."""
    terms: Mapping[str, Tensor]
    """Scalars, detached, by name (``policy_loss``, ``kl_loss`` ...). Already normalised: add them up."""
    statistics: Mapping[str, Tensor]
    """Scalars, detached: sums over unmasked tokens; divide by ``statistics["num_tokens"]`` for means."""


class MicroBatchRows(Protocol):
    """Which rows a micro-batch holds, and which of its tokens belong to which row."""

    @property
    def rows(self) -> Sequence[int]:
        """Indices into the rows that the loss was prepared with, in the micro-batch's order."""

    @property
    def row_index_n(self) -> Tensor:
        """[N] int64, place in ``rows`` of each token's row."""

    def divergence(self, tokens: Tensor, targets: Targets, measure: Measure) -> Tensor:
        """[m] the policy's divergence from ``targets``, in nats, with gradient.

        Computed in chunks: nothing of the size [m, V] is kept for the backward pass.

        Args:
            tokens: [m] int64, which of the N tokens, ascending.
            targets: of these tokens.
            measure: which divergence.
        """


class PreparedLoss(Protocol):
    """A token loss that knows the whole batch: denominators and other constants are settled."""

    def __call__(self, batch: MicroBatchRows, logprobs: Tensor, entropy: Tensor) -> LossOutput:
        """The loss of one micro-batch.

        Args:
            batch: which rows it holds.
            logprobs: [N] of the sampled tokens under the policy, with gradient.
            entropy: [N] of the policy at each token, in nats, with gradient.
        """


class TokenLoss(Protocol):
    """A differentiable loss of rows' tokens. Two that compare equal are computed together."""

    def prepare(self, rows: Sequence[TrainRow]) -> PreparedLoss:
        """Settles what needs the whole batch. ``rows`` are all rows of the update, over all ranks."""


class Objective(Protocol):
    """How one component of the loss is made."""

    @property
    def asks(self) -> Ask:
        """What the teacher is asked about every rollout; ``Ask()`` asks nothing."""

    @property
    def asks_own(self) -> Ask:
        """What the learning branch's own actor is asked at the start of the step, besides the log-probability
        of every token. ``asks.support`` sends the ids of its ``top_k`` to the teacher."""

    @property
    def needs_old_logprobs(self) -> bool:
        """Whether ``rows`` or the loss needs log-probabilities under the actor at the start of the step.

        Where it does not, the update's own forward pass gives them: on-policy they are the same.
        """

    def rows(self, material: Material) -> list[TrainRow]:
        """Training rows, one for each rollout, in order.

        Raises:
            ValueError: something the objective needs is missing, has another length or is not finite.
        """

    def token_loss(self) -> TokenLoss:
        """The loss of these rows' tokens."""


class ObjectiveFactory(Protocol):
    """What a file of this room defines as ``OBJECTIVE``: a class with this method."""

    def of(self, context: Context) -> Objective:
        """The objective that the settings describe.

        Raises:
            ConfigError: the settings make no sense together.
        """


@dataclass(frozen=True)
class ByComponent:
    """The token loss of an update whose rows belong to several components."""

    losses: Mapping[str, TokenLoss]
    """Component to its objective's token loss."""

    def prepare(self, rows: Sequence[TrainRow]) -> PreparedLoss:
        """Rows whose losses compare equal go through one call; today's objectives share the surrogate."""
        groups: list[tuple[TokenLoss, list[int]]] = []
        for number, row in enumerate(rows):
            loss = self.losses[row.component]
            members = next((members for other, members in groups if other == loss), None)
            if members is None:
                groups.append((loss, [number]))
            else:
                members.append(number)
        if len(groups) == 1:
            return groups[0][0].prepare(rows)
        return _Mixed([(loss.prepare([rows[i] for i in members]), members) for loss, members in groups])


@dataclass(frozen=True, kw_only=True)
class _Part:
    """The share of one loss in a micro-batch."""

    rows: Sequence[int]
    row_index_n: Tensor
    whole: MicroBatchRows
    tokens: Tensor
    """[m] int64, which tokens of ``whole`` these are."""

    def divergence(self, tokens: Tensor, targets: Targets, measure: Measure) -> Tensor:
        return self.whole.divergence(self.tokens[tokens], targets, measure)


class _Mixed:
    """Several prepared losses over one micro-batch, each on the tokens of its own rows."""

    def __init__(self, parts: Sequence[tuple[PreparedLoss, Sequence[int]]]) -> None:
        self._losses = [loss for loss, _ in parts]
        self._home = {
            row: (part, place) for part, (_, rows) in enumerate(parts) for place, row in enumerate(rows)
        }

    def __call__(self, batch: MicroBatchRows, logprobs: Tensor, entropy: Tensor) -> LossOutput:
        outputs = []
        for number, loss in enumerate(self._losses):
            places = [place for place, row in enumerate(batch.rows) if self._home[row][0] == number]
            renumbered = batch.row_index_n.new_full((max(len(batch.rows), 1),), -1)
            renumbered[places] = torch.arange(len(places), device=renumbered.device)
            index = renumbered[batch.row_index_n]
            mine = index >= 0
            part = _Part(
                rows=[self._home[batch.rows[p]][1] for p in places],
                row_index_n=index[mine],
                whole=batch,
                tokens=torch.nonzero(mine).squeeze(1),
            )
            outputs.append(loss(part, logprobs[mine], entropy[mine]))
        return _sum(outputs)


def _sum(outputs: Sequence[LossOutput]) -> LossOutput:
    return LossOutput(
        loss=sum((output.loss for output in outputs[1:]), outputs[0].loss),
        terms=_sum_by_name([output.terms for output in outputs]),
        statistics=_sum_by_name([output.statistics for output in outputs]),
    )


def _sum_by_name(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total[name] + value if name in total else value
    return total
