"""Settings of what is learnt: the branch's own rows, the distillation graph, loss and advantages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from omegaconf import MISSING

from copd_megatron.config.bounds import (
    Bounds,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Share,
)
from copd_megatron.config.schema.choices import (
    Aggregation,
    Balance,
    KLEstimator,
    KLPlacement,
    MismatchCorrection,
    Privilege,
    RatioLevel,
    Surrogate,
    TeacherMode,
    Topology,
)
from copd_megatron.config.schema.distillation import (
    CalibrationConfig,
    DistributionConfig,
    FeedbackConfig,
    GateConfig,
)


@dataclass(kw_only=True)
class NativeConfig:
    """What a branch learns from its own prompts."""

    objective: str = "grpo"
    """A file of ``copd_megatron/objectives``, or one of your own: ``package.module:OBJECTIVE``."""
    weight: NonNegativeFloat = 1.0
    """Factor on the loss of a branch's own rows. 0: none are sampled, which leaves pure distillation."""


@dataclass(kw_only=True)
class EdgeConfig:
    """One edge of the distillation graph: with ``opd.topology=custom`` the edge itself, otherwise settings of
    an edge that the topology makes."""

    student: str = MISSING
    """Branch that learns. It samples the responses."""
    teacher: str = MISSING
    """Branch that scores the student's responses."""
    prompts: str | None = None
    """Branch whose prompts the student answers. Null: the teacher's."""
    beta: PositiveFloat | None = None
    """This edge's strength. Null: ``opd.beta``."""
    num_prompts_per_step: PositiveInt | None = None
    """This edge's prompts per step. Null: ``opd.num_prompts_per_step``."""
    objective: str | None = None
    """Objective of this edge. Null: ``opd.objective``."""
    weight: NonNegativeFloat | None = None
    """Factor on the loss of this edge's rows. Null: ``opd.weight``."""
    context: Privilege = Privilege.none
    """What the teacher reads besides the student's prompt. ``own_correct``: another response of the student
    to it that is correct, and a peer's feedback, if there is a ``peer``. A branch can be its own teacher only
    with a context."""
    peer: str | None = None
    """Branch whose feedback on the student's response the teacher reads (``opd.feedback``). Needs a
    ``context``."""


@dataclass(kw_only=True)
class BehaviourConfig:
    """Top-k overlap (Eq. 6) and symmetric KL between student and teacher on states that the student
    visits."""

    top_k: PositiveInt = 10
    """Most probable tokens whose overlap is measured. The paper: 10."""
    num_states: NonNegativeInt = 64
    """States per edge and measurement. On each of them the teacher sends its whole distribution (4 bytes
    per vocabulary entry). 0: nothing is measured."""
    every_steps: PositiveInt = 1
    """Steps between measurements, in both phases."""


@dataclass(kw_only=True)
class OPDConfig:
    """Who teaches whom, on what, and how strongly."""

    objective: str = "sampled_token"
    """How a student learns from what its teacher says: a file of ``copd_megatron/objectives``, or one of your
    own, ``package.module:OBJECTIVE``."""
    topology: Topology = Topology.hub_and_spoke
    """Who teaches whom. ``hub_and_spoke``: the hub and every other branch teach each other, 2 (K - 1) edges.
    ``all_to_all``: everyone teaches everyone, K (K - 1) edges. ``custom``: the edges listed. ``none``."""
    hub: str | None = None
    """Hub of ``hub_and_spoke``. Null: the first branch. The paper: the text branch."""
    edges: list[EdgeConfig] = field(default_factory=list)
    """With ``custom``, all edges. With the other topologies, settings of single edges (beta, weight)."""
    weight: NonNegativeFloat = 1.0
    """Factor on the loss of every edge's rows. 0: none are sampled; behaviour is measured all the same."""
    beta: PositiveFloat = 1.0
    """Strength of distillation: token advantage = beta x (log pi_teacher - log pi_student) (Eq. 8). The
    paper does not give a value. Lower it if cross rows drown the reward's gradient."""
    num_prompts_per_step: PositiveInt | None = None
    """Prompts per edge and step. Null: the student's ``num_prompts_per_step``."""
    num_generations_per_prompt: PositiveInt | None = None
    """Responses per prompt of an edge. Null: the student's ``num_generations_per_prompt``."""
    distribution: DistributionConfig = field(default_factory=DistributionConfig)
    """How the objectives ``topk`` and ``full`` compare distributions."""
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    """What the responses' verdicts change about their teacher's scores (Uni-OPD)."""
    feedback: FeedbackConfig = field(default_factory=FeedbackConfig)
    """Privileged contexts, and feedback from peers (OPCoD)."""
    grade_responses: bool = True
    """Grade the responses to other branches' prompts. False saves the verifiers' time; nothing that depends
    on their rewards can be used then."""
    gate: GateConfig = field(default_factory=GateConfig)
    """Where a live teacher may teach."""
    teacher_temperature: PositiveFloat = 1.0
    """Factor on the sampling temperature at which a teacher is asked. Below 1 its distribution is sharper."""
    extrapolation: NonNegativeFloat = 1.0
    """Lambda of G-OPD: the advantage is lambda log pi_teacher + (1 - lambda) log pi_base - log pi_student. 1:
    Eq. 8. Above 1 the student goes beyond its teacher, away from the base model. ``sampled_token`` only."""
    outcome_weight: NonNegativeFloat = 0.0
    """Alpha of MOPD: the group-relative advantage of a cross response's reward (Eq. 11) is added to its token
    advantages, times this. ``sampled_token`` only. 0: rewards of cross responses teach nothing."""
    delta_clip: PositiveFloat | None = None
    """Clip log pi_teacher - log pi_student to plus or minus this bound, in nats. Null: no clipping. Set it
    if rare tokens dominate the gradient."""
    ship_media: bool = False
    """Send images and videos along with the rows to be scored, for branches that do not share storage.
    False: the teacher reads them itself."""
    teacher_mode: TeacherMode = TeacherMode.live
    """Weights that a branch teaches with. ``live``: those it has at the start of the step, as in the paper.
    ``phase_snapshot``: those at the start of Phase II. ``every_n_steps``: renewed during Phase II. ``ema``: a
    moving average of the weights since the first OPD step."""
    ema_rate: Share = 0.05
    """Share of the live weights in each step's average with ``ema``."""
    snapshot_every_steps: PositiveInt = 1
    """OPD steps between renewals with ``every_n_steps``."""
    max_teacher_lag: NonNegativeInt = 0
    """Steps by which a branch may be ahead of another within a phase, 0 or 1. 0: branches that exchange
    anything end every step together. 1: the responses to be taught (and the probes of ``behaviour``) are
    sampled and sent to the teachers one step before they are learned from; the teachers score them at the
    beginning of the step that learns, with the weights that ``teacher_mode`` says, as of that step. So
    branches of equal speed wait less for whoever happens to be slow in a step, and a frozen teacher scores
    while its student goes on; a branch that is always faster still waits for the others at the end of the
    phase. The rows are one update old, which the importance ratio accounts for, and the numbers depend on
    the seed alone, not on speed. Needs ``training.max_weight_lag`` of at least 1."""
    behaviour: BehaviourConfig = field(default_factory=BehaviourConfig)
    """How alike the branches stay, as metrics."""


@dataclass(kw_only=True)
class LossConfig:
    """The clipped surrogate (Eq. 7) and its options; see ``objectives/policy_loss.py``."""

    surrogate: Surrogate = Surrogate.clipped
    """``clipped``: Eq. 7. ``cispo``: every token keeps its gradient, weighted by the clipped ratio. ``sapo``:
    the gradient fades smoothly as the ratio leaves 1."""
    sapo_temperature_positive: PositiveFloat = 1.0
    """How fast the gradient of ``sapo`` fades where the advantage is positive."""
    sapo_temperature_negative: PositiveFloat = 1.05
    """The same where it is negative, which should fade faster."""
    balance: Balance = Balance.none
    """``share``: each component's share of the sum of weight x |advantage| is brought to its weight's share
    of all weights. ``drift``: each component's weight is multiplied by (its mean |advantage| now / at its
    first step) ^ ``balance_exponent`` (Open-MOPD). Either factor stays within [0.05, 20]. ``none``: off."""
    balance_exponent: float = -1.0
    """Exponent of ``drift``. Negative: a component whose advantages have shrunk weighs more."""

    aggregation: Aggregation = Aggregation.seq_mean_token_mean
    """How token losses are averaged. ``seq_mean_token_mean``: over a response, then over responses (Eq. 7).
    ``token_mean``: over all tokens, so that long responses weigh more. ``seq_mean_token_sum``: summed over a
    response, averaged over responses. ``constant``: as that, divided by ``constant_divisor`` (Dr. GRPO)."""
    constant_divisor: PositiveFloat | None = None
    """Divisor of a response's token sum, in tokens, with ``constant``. Null: the branch's
    ``max_new_tokens``."""
    ratio_level: RatioLevel = RatioLevel.token
    """Importance ratio of each token (GRPO), or one for the whole sequence (GSPO)."""
    ratio_clip_min: Annotated[float, Bounds(above=0, below=1)] = 0.2
    """Lower clip bound: ratios below 1 - this get no gradient where the advantage is negative. The paper:
    0.2."""
    ratio_clip_max: PositiveFloat = 0.28
    """Upper clip bound: ratios above 1 + this get no gradient where the advantage is positive. The paper:
    0.28."""
    dual_clip: Annotated[float, Bounds(above=1)] | None = None
    """Bound on the loss of tokens with a negative advantage, as a multiple of it (3.0 is usual). Null: off.
    Set it if single tokens with huge ratios upset training."""
    kl_coefficient: NonNegativeFloat = 0.0
    """Weight of KL(policy || base model), Eq. 12. 0: off, and no copy of the base model is kept. CoPD's own
    loss (Eq. 7) has no such term."""
    kl_estimator: KLEstimator = KLEstimator.k3
    """How the KL is estimated from sampled tokens: ``k1`` (unbiased, noisy), ``k2`` (biased value, unbiased
    gradient), ``k3`` (unbiased, never negative; GRPO's)."""
    kl_placement: KLPlacement = KLPlacement.loss
    """Add the KL to the ``loss``, or subtract it from the token advantages (``reward``)."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus, per nat of mean token entropy. Positive keeps the policy more random. 0:
    off."""
    mismatch_correction: MismatchCorrection = MismatchCorrection.none
    """Weight by rho = pi_actor / pi_vLLM of what was sampled, for engines that differ by precision or
    quantization, and for ``rollout.top_p`` or ``top_k``. ``tis_token``: min(rho, C) of a token;
    ``tis_sequence``: of a response; ``icepop``: tokens outside the bounds are dropped;
    ``sequence_rejection``: responses outside the bounds are dropped. ``none``: off."""
    mismatch_cap: PositiveFloat = 2.0
    """Cap C of ``tis_token`` and ``tis_sequence``."""
    mismatch_bounds: list[NonNegativeFloat] = field(default_factory=lambda: [0.5, 5.0])
    """Lower and upper bound on rho for ``icepop`` and ``sequence_rejection``."""


@dataclass(kw_only=True)
class AdvantageConfig:
    """GRPO advantages (Eq. 11) and the choice of samples; see ``objectives/grpo.py``."""

    normalize_std: bool = True
    """Divide rewards by their group's standard deviation (Eq. 11). False: subtract the mean only (Dr.
    GRPO)."""
    std_epsilon: PositiveFloat = 1e-6
    """Added to the standard deviation, so that groups of nearly equal rewards are not blown up."""
    dynamic_sampling: bool = False
    """Drop groups whose rewards are all equal, which teach nothing, and sample further prompts in their
    place."""
    dynamic_sampling_max_rounds: PositiveInt = 3
    """Sampling rounds per step with ``dynamic_sampling``, the first one included. After the last, the step
    goes on with what it has."""
    overlong_buffer_tokens: NonNegativeInt = 0
    """Soft punishment of long responses: over the last this many tokens before ``max_new_tokens``, the
    reward falls linearly by ``overlong_penalty``. 0: off."""
    overlong_penalty: NonNegativeFloat = 1.0
    """What a response of full length loses, in units of reward."""
    overlong_filtering: bool = False
    """Train on no token of a truncated response. It still counts in its group's mean."""
