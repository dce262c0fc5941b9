"""Settings of what is learnt: the branch's own rows, the distillation graph, loss and advantages."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from copd_megatron.config.bounds import number
from copd_megatron.config.schema.choices import (
    Aggregation,
    KLEstimator,
    KLPlacement,
    MismatchCorrection,
    RatioLevel,
    TeacherMode,
    Topology,
)


@dataclass(kw_only=True)
class NativeConfig:
    """What a branch learns from its own prompts."""

    objective: str = "grpo"
    """A file of ``copd_megatron/objectives``, or one of your own: ``package.module:OBJECTIVE``."""
    weight: float = number(1.0, at_least=0)
    """Factor on the loss of a branch's own rows. 0: none are sampled, which leaves pure distillation."""


@dataclass(kw_only=True)
class EdgeConfig:
    """One edge of the distillation graph: with ``opd.topology=custom`` the edge itself, otherwise settings of
    an edge that the topology makes."""

    student: str = MISSING
    """Branch that learns."""
    teacher: str = MISSING
    """Branch that scores."""
    prompts: str | None = None
    """Branch whose prompts are used. Null: the teacher's."""
    beta: float | None = None
    """Strength of this edge. Null: ``opd.beta``."""
    num_prompts_per_step: int | None = None
    """Prompts of this edge per step. Null: ``opd.num_prompts_per_step``."""
    objective: str | None = None
    """Objective of this edge. Null: ``opd.objective``."""
    weight: float | None = None
    """Factor on the loss of this edge's rows. Null: ``opd.weight``."""


@dataclass(kw_only=True)
class BehaviourConfig:
    """Top-k overlap (Eq. 6) and symmetric KL between student and teacher on states that the student
    visits."""

    top_k: int = number(10, at_least=1)
    """k of the overlap. The paper uses 10."""
    num_states: int = number(64, at_least=0)
    """States per edge and measurement, on which both are computed exactly. 0: no measurement."""
    every_steps: int = number(1, at_least=1)
    """Steps between measurements, in both phases."""


@dataclass(kw_only=True)
class OPDConfig:
    """Who teaches whom, on what, and how strongly."""

    objective: str = "sampled_token"
    """How a student learns from what its teacher says: a file of ``copd_megatron/objectives``, or one of your
    own, ``package.module:OBJECTIVE``."""
    topology: Topology = Topology.hub_and_spoke
    """Which edges there are."""
    hub: str | None = None
    """Hub of ``hub_and_spoke``. Null: the first branch."""
    edges: list[EdgeConfig] = field(default_factory=list)
    """With ``custom``, all edges; otherwise settings of single edges."""
    weight: float = number(1.0, at_least=0)
    """Factor on the loss of every edge's rows. 0: none are sampled; behaviour is measured all the same."""
    beta: float = 1.0
    """Token advantage = beta * (log pi_teacher - log pi_student) (Eq. 8). The paper gives no value."""
    num_prompts_per_step: int | None = None
    """Cross prompts per edge and step. Null: the student's own ``num_prompts_per_step``."""
    num_generations_per_prompt: int | None = None
    """Responses per cross prompt. Null: the student's own ``num_generations_per_prompt``."""
    delta_clip: float | None = number(None, above=0)
    """Bound on |log pi_teacher - log pi_student| per token. Null: none."""
    ship_media: bool = False
    """Send images and videos with the rows to be scored, for branches that do not share storage. False: the
    teacher reads them itself, by reference."""
    teacher_mode: TeacherMode = TeacherMode.live
    """Which weights a live branch teaches with."""
    snapshot_every_steps: int = number(1, at_least=1)
    """Steps of Phase II between snapshots, for ``teacher_mode=every_n_steps``."""
    behaviour: BehaviourConfig = field(default_factory=BehaviourConfig)
    """How alike the branches stay, as metrics."""


@dataclass(kw_only=True)
class LossConfig:
    """The clipped surrogate (Eq. 7) and its options; see ``objectives/policy_loss.py``."""

    aggregation: Aggregation = Aggregation.seq_mean_token_mean
    """How token losses become one number. The paper's is ``seq_mean_token_mean``."""
    constant_divisor: float | None = number(None, above=0)
    """Divisor of token sums with ``constant`` (Dr. GRPO). Null: the branch's ``max_new_tokens``."""
    ratio_level: RatioLevel = RatioLevel.token
    """Whether the importance ratio is per token (GRPO) or per sequence (GSPO)."""
    ratio_clip_min: float = number(0.2, above=0)
    """The ratio pi / pi_old is clipped below at 1 - this. The paper uses 0.2."""
    ratio_clip_max: float = number(0.28, above=0)
    """The ratio pi / pi_old is clipped above at 1 + this. The paper uses 0.28."""
    dual_clip: float | None = number(None, above=1)
    """Bound c > 1 on the loss of negative advantages, usually 3.0. Null: off."""
    kl_coefficient: float = number(0.0, at_least=0)
    """Weight of KL(policy || reference), Eq. 12. 0: no reference model is kept."""
    kl_estimator: KLEstimator = KLEstimator.k3
    """How the KL is estimated from sampled tokens."""
    kl_placement: KLPlacement = KLPlacement.loss
    """Where the KL term goes."""
    entropy_coefficient: float = 0.0
    """Entropy bonus: the loss contains minus this times the mean entropy."""
    mismatch_correction: MismatchCorrection = MismatchCorrection.none
    """What is done about log-probabilities that differ between vLLM and the trainer."""
    mismatch_cap: float = number(2.0, above=0)
    """Cap C of truncated importance sampling (``tis_token``, ``tis_sequence``)."""
    mismatch_bounds: list[float] = field(default_factory=lambda: [0.5, 5.0])
    """Lower and upper bound on pi_old / pi_rollout for ``icepop`` and ``sequence_rejection``."""


@dataclass(kw_only=True)
class AdvantageConfig:
    """GRPO advantages (Eq. 11) and the choice of samples; see ``objectives/grpo.py``."""

    normalize_std: bool = True
    """Divide by the standard deviation of the group's rewards."""
    std_epsilon: float = number(1e-6, above=0)
    """Added to that standard deviation."""
    dynamic_sampling: bool = False
    """Drop groups whose rewards are all equal and sample further prompts in their place."""
    dynamic_sampling_max_rounds: int = number(3, at_least=1)
    """Sampling rounds per step, including the first."""
    overlong_buffer_tokens: int = number(0, at_least=0)
    """Soft overlong punishment: over this many last tokens before ``max_new_tokens`` the reward falls
    linearly by ``overlong_penalty``. 0: off."""
    overlong_penalty: float = number(1.0, at_least=0)
    """How far the reward falls at ``max_new_tokens``."""
    overlong_filtering: bool = False
    """Leave truncated responses out of the loss. They still count in the group's baseline."""
