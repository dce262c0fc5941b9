"""Settings of distillation beyond the graph: distributions, calibration by verdicts, the reliability gate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from copd_megatron.config.bounds import Bounds, NonNegativeFloat, PositiveFloat, PositiveInt, Share
from copd_megatron.config.schema.choices import (
    Divergence,
    Gate,
    Margin,
    MarginShift,
    MarginStatistic,
    Scope,
    Support,
)


@dataclass(kw_only=True)
class DistributionConfig:
    """How the objectives ``topk`` and ``full`` compare the student's distribution with its teacher's."""

    divergence: Divergence = Divergence.reverse_kl
    """``reverse_kl``: KL(student || teacher), which seeks the teacher's modes. ``forward_kl``: KL(teacher ||
    student), which covers them all. ``jsd``: generalised Jensen-Shannon, between the two."""
    jsd_alpha: Annotated[float, Bounds(above=0, below=1)] = 0.5
    """Weight of the teacher's side in ``jsd``. Towards 0 its gradient is that of the forward KL, towards 1
    that of the reverse."""
    top_k: PositiveInt = 16
    """Ids per token on which ``topk`` compares. At most the vocabulary."""
    support: Support = Support.teacher
    """Whose likeliest ids these are. ``union`` and ``intersection`` cost as many bytes as ``student`` and
    ``teacher`` together."""
    rest: bool = True
    """Count the probability outside the ids as one more outcome. False: both distributions are renormalised
    over the ids."""
    entropy_threshold: NonNegativeFloat | None = None
    """Add the forward KL at tokens where the teacher's entropy is above this, in nats: where the teacher is
    unsure, the student should keep all its answers. Null: nowhere."""


@dataclass(kw_only=True)
class CalibrationConfig:
    """Uni-OPD: what the verdicts say of a teacher's scores, and what is done about it. All off by default.

    The return G of a response is the mean of log pi_teacher - log pi_student over its tokens. A teacher's
    scores keep the order of a group if its correct responses have larger returns than the others, by
    ``margin_target`` at least."""

    margin: Margin = Margin.none
    """Where the margin is too small: ``shift`` moves the scores of whole responses until it is not, ``mask``
    leaves the worst responses out."""
    statistic: MarginStatistic = MarginStatistic.mean
    """``mean``: mean G of correct minus mean G of incorrect responses. ``min_max``: the least correct minus
    the largest incorrect."""
    margin_target: float = 0.0
    """Smallest margin that is wanted, in nats per token. Uni-OPD: 0.4 for text, 0 for images."""
    shift: MarginShift = MarginShift.both
    """What moves: ``both``: correct responses up and incorrect ones down by half. ``lift``: correct ones up.
    ``drop``: incorrect ones down."""
    margin_scope: Scope = Scope.group
    """Margin of every prompt's group, or of the whole batch of an edge."""
    mask_floor: Share = 0.25
    """Share of each class that ``margin=mask`` always keeps (and one response at least)."""
    correct_reward: float = 1.0
    """A response counts as correct from this reward on."""
    balance: PositiveFloat | None = None
    """Correct to incorrect responses that train: the excess of either class is left out at random. Uni-OPD:
    1.0 for math, 1.2 for code. Null: all train."""
    balance_scope: Scope = Scope.group
    """Balance every prompt's group, or the whole batch of an edge."""
    max_gap: PositiveFloat | None = None
    """Tokens on which teacher and student differ by this or more, in nats, are left out. Uni-OPD: 10. Null:
    none."""

    @property
    def needs_verdicts(self) -> bool:
        """Whether something depends on the responses' rewards."""
        return self.margin is not Margin.none or self.balance is not None


@dataclass(kw_only=True)
class FeedbackConfig:
    """What a teacher with a privileged context reads, and how a peer's feedback comes about (OPCoD)."""

    correct_reward: float = 1.0
    """A response counts as correct from this reward on."""
    gate_pass_rate: Annotated[float, Bounds(at_least=0, at_most=1)] = 0.5
    """The peer gives feedback on a prompt only if it passes at least this share of its own attempts."""
    gate_samples: PositiveInt = 4
    """Attempts of the peer at a prompt. They decide whether it may give feedback."""
    max_new_tokens: PositiveInt = 256
    """Longest feedback in tokens."""
    require_concept: bool = True
    """Keep a peer's feedback only if it begins with ``Concept:`` and words of the problem."""
    context_prompt: str = (
        "\n\nHere is a correct solution to this problem:\n{solution}\n\nAnd here is a comment on an attempt "
        "at it:\n{feedback}\n\nNow solve the problem yourself."
    )
    """Put behind the problem for the teacher's eyes. ``{solution}`` and ``{feedback}`` are filled in, and a
    paragraph whose part is missing is left out."""
    tutor_prompt: str = (
        "\n\nA student answered:\n{attempt}\n\nOn the first line, write 'Concept:' and one concept that the "
        "problem names. Then say where the attempt goes wrong, or why it is right. Do not state the answer."
    )
    """Put behind the problem for the peer's eyes. ``{attempt}`` is filled in."""


@dataclass(kw_only=True)
class GateConfig:
    """Teach only where the teacher is better than the student: early live teachers are no better."""

    scope: Gate = Gate.none
    """``prompt``: the teacher answers each prompt itself, and teaches where its pass rate is above the
    student's. ``pool``: the pass rates over all of the step's prompts of an edge are compared. ``none``:
    teachers always teach."""
    margin: Annotated[float, Bounds(at_least=-1, at_most=1)] = 0.0
    """How much above the student's the teacher's pass rate must be."""
    num_samples: PositiveInt = 4
    """Responses with which a teacher answers a prompt."""
    correct_reward: float = 1.0
    """A response counts as passed from this reward on."""
