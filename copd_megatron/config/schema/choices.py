"""Settings that are one of a few words."""

from __future__ import annotations

from enum import Enum


class Device(Enum):
    """Where the actors run. ``auto``: on GPUs if torch sees any."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Topology(Enum):
    """Who teaches whom (paper section 3.3). ``hub_and_spoke``: the hub and every other branch teach each
    other; ``all_to_all``: every branch teaches every other; ``custom``: the edges in ``opd.edges``; ``none``:
    nobody."""

    none = "none"
    hub_and_spoke = "hub_and_spoke"
    all_to_all = "all_to_all"
    custom = "custom"


class TeacherMode(Enum):
    """Which weights a live branch teaches with. ``live``: those at the start of the step; ``phase_snapshot``:
    those at the start of Phase II; ``every_n_steps``: a snapshot renewed every
    ``opd.snapshot_every_steps``; ``ema``: a moving average of the weights."""

    live = "live"
    phase_snapshot = "phase_snapshot"
    every_n_steps = "every_n_steps"
    ema = "ema"


class Divergence(Enum):
    """How two distributions are compared (``objectives/divergence.py``)."""

    reverse_kl = "reverse_kl"
    forward_kl = "forward_kl"
    jsd = "jsd"


class Support(Enum):
    """Whose likeliest ids two distributions are compared on."""

    student = "student"
    teacher = "teacher"
    union = "union"
    intersection = "intersection"


class Margin(Enum):
    """What is done about a group whose returns contradict its verdicts (``objectives/calibration.py``)."""

    none = "none"
    shift = "shift"
    mask = "mask"


class MarginStatistic(Enum):
    """Which returns of correct and incorrect responses are compared."""

    mean = "mean"
    min_max = "min_max"


class MarginShift(Enum):
    """Which responses a margin shift moves."""

    both = "both"
    lift = "lift"
    drop = "drop"


class Scope(Enum):
    """What a margin or a balance is taken over."""

    group = "group"
    batch = "batch"


class Gate(Enum):
    """Where a teacher's and a student's pass rates are compared."""

    none = "none"
    prompt = "prompt"
    pool = "pool"


class Balance(Enum):
    """How the components of an update are kept in balance (``objectives/shares.py``)."""

    none = "none"
    share = "share"
    drift = "drift"


class Surrogate(Enum):
    """How a token's advantage and ratio make its loss (``objectives/policy_loss.py``)."""

    clipped = "clipped"
    cispo = "cispo"
    sapo = "sapo"


class Privilege(Enum):
    """What a teacher reads that its student did not (``objectives/README.md``). ``own_correct``: another
    response to the same prompt, sampled by the student and correct."""

    none = "none"
    own_correct = "own_correct"


class Aggregation(Enum):
    """How per-token losses become one number (``objectives/denominators.py``)."""

    seq_mean_token_mean = "seq_mean_token_mean"
    token_mean = "token_mean"
    seq_mean_token_sum = "seq_mean_token_sum"
    constant = "constant"


class RatioLevel(Enum):
    """Importance ratio per token (GRPO) or per sequence (GSPO)."""

    token = "token"
    sequence = "sequence"


class KLEstimator(Enum):
    """Schulman's estimators of KL(policy || reference) from sampled tokens."""

    k1 = "k1"
    k2 = "k2"
    k3 = "k3"


class KLPlacement(Enum):
    """Whether the KL term is added to the loss or subtracted from the token advantages."""

    loss = "loss"
    reward = "reward"


class MismatchCorrection(Enum):
    """Correction for the rollout engine and the trainer disagreeing on the sampling policy
    (``objectives/mismatch.py``)."""

    none = "none"
    tis_token = "tis_token"
    tis_sequence = "tis_sequence"
    icepop = "icepop"
    sequence_rejection = "sequence_rejection"


class FP8Recipe(Enum):
    """How Transformer Engine scales FP8 matrices. ``delayed``: by the largest values of earlier steps;
    ``tensorwise``: of the tensor itself; ``blockwise``: of blocks of 128 (Hopper); ``mxfp8``: of blocks of 32
    (Blackwell)."""

    none = "none"
    delayed = "delayed"
    tensorwise = "tensorwise"
    blockwise = "blockwise"
    mxfp8 = "mxfp8"


class FP8Format(Enum):
    """``hybrid``: E4M3 in the forward pass, E5M2 for gradients."""

    hybrid = "hybrid"
    e4m3 = "e4m3"


class Recompute(Enum):
    """Activations that the backward pass computes again: ``selective``: parts of a layer; ``full``: whole
    layers."""

    none = "none"
    selective = "selective"
    full = "full"


class RolloutQuantization(Enum):
    """What vLLM turns the actor's weights into."""

    none = "none"
    fp8 = "fp8"


class DifficultyBalance(Enum):
    """Which prompts are repeated, by their number of correct responses among N, until each of these numbers
    is as frequent as the most frequent of them. ``u_shape``: 1 to N - 1; ``mirrored_j``: 1 to N."""

    none = "none"
    u_shape = "u_shape"
    mirrored_j = "mirrored_j"


class LRSchedule(Enum):
    """Decay of the learning rate after the warm-up."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"
