"""Settings of the update: precision, optimizer, micro-batches, memory and weight sync."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from copd_megatron.config.bounds import (
    Bounds,
    NonNegativeFloat,
    NonNegativeInt,
    OneOf,
    PositiveFloat,
    PositiveInt,
)
from copd_megatron.config.schema.choices import FP8Format, FP8Recipe, LRSchedule, Recompute

RECOMPUTED_PARTS = OneOf(("core_attn", "mlp", "moe", "moe_act"))


@dataclass(kw_only=True)
class PrecisionConfig:
    """FP8 in the actor's decoder layers (GPU). Embedding, output layer and vision tower stay in bfloat16."""

    fp8: FP8Recipe = FP8Recipe.none
    """How FP8 matrices are scaled; ``copd doctor`` shows what this machine supports. ``none``: no FP8."""
    fp8_format: FP8Format = FP8Format.hybrid
    """FP8 format: ``hybrid`` (E4M3 forward, E5M2 for gradients) or ``e4m3`` for both."""
    num_bf16_layers_at_start: NonNegativeInt = 0
    """First decoder layers that stay in bfloat16, which often steadies training. Not with ``delayed``."""
    num_bf16_layers_at_end: NonNegativeInt = 0
    """Last decoder layers that stay in bfloat16. Not with ``delayed``."""
    fp8_parameters: bool = False
    """Keep the layers' weights in FP8 only and gather them so over data-parallel ranks. The optimizer keeps
    its float32 copy."""


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW and its learning rate."""

    lr: PositiveFloat = 1e-6
    """Learning rate after the warm-up. The paper: 1e-6. Tiny models need 1e-4 and more."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate at the end of a ``linear`` or ``cosine`` schedule."""
    lr_schedule: LRSchedule = LRSchedule.constant
    """What the learning rate does between the warm-up and the run's last update: stay ``constant``, or fall
    to ``min_lr``."""
    lr_warmup_steps: NonNegativeInt = 0
    """Updates over which the learning rate rises linearly from 0. A step makes ``training.num_mini_batches``
    updates."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay per update, multiplied by the learning rate."""
    adam_beta1: Annotated[float, Bounds(at_least=0, below=1)] = 0.9
    """Decay of the gradient's running mean. 1 would never move the weights."""
    adam_beta2: Annotated[float, Bounds(at_least=0, below=1)] = 0.999
    """Decay of the squared gradient's running mean. Lower it (0.95) if the loss spikes."""
    adam_eps: PositiveFloat = 1e-8
    """Added to the root of the squared gradient's mean, so that nothing is divided by 0."""
    clip_grad: NonNegativeFloat = 1.0
    """Gradients with a larger global norm are scaled down to it. 0: no clipping."""
    precision_aware: bool = False
    """Keep gradients, master weights and moments in the number formats below, by Transformer Engine's Adam
    (GPU). False: all in float32."""
    main_grads_dtype: Annotated[str, OneOf(("float32", "bfloat16"))] = "float32"
    """Number format of accumulated gradients: float32 or bfloat16."""
    main_params_dtype: Annotated[str, OneOf(("float32", "float16"))] = "float32"
    """Number format of the optimizer's master weights: float32 or float16."""
    moments_dtype: Annotated[str, OneOf(("float32", "bfloat16", "float16", "uint8"))] = "float32"
    """Number format of Adam's two moments: float32, bfloat16, float16 or uint8 (FP8 with a scale)."""
    cpu_offload_fraction: Annotated[float, Bounds(at_least=0, at_most=1)] = 0.0
    """Share of the optimizer's states that stay, and are updated, in host memory. Raise it when a GPU's
    memory does not do; updates become slower."""


@dataclass(kw_only=True)
class TrainingConfig:
    """How a step's rows are computed."""

    micro_batch_tokens: PositiveInt = 16384
    """Most tokens in one micro-batch, padding included, on one data- and context-parallel rank. Lower it
    when activations do not fit; it must hold one longest sequence."""
    sequence_packing: bool = True
    """Put the rows of a micro-batch one behind the other without padding. False: pad them to the longest."""
    share_prompts: bool | None = None
    """Compute a prompt once for all of its responses in a micro-batch, media included; only attention then
    sees every row whole. Null: on a CPU, where rows are packed and context parallelism is off. On a GPU it is
    not yet measured: set it to true there to try it."""
    recompute: Recompute = Recompute.none
    """Compute activations again in the backward pass instead of keeping them, to save memory: of some parts
    of each layer (``selective``) or of whole layers (``full``)."""
    recompute_modules: list[Annotated[str, RECOMPUTED_PARTS]] = field(default_factory=lambda: ["core_attn"])
    """Parts for ``selective``: core_attn, mlp; in mixture-of-experts models moe, moe_act. core_attn saves
    little on GPUs, whose fused attention keeps little."""
    recompute_num_layers: PositiveInt = 1
    """With ``full``, keep the activations at every n-th layer only. More saves memory and takes no more
    time."""
    overlap_grad_reduce: bool = False
    """Sum gradients over data-parallel ranks while the backward pass goes on."""
    overlap_param_gather: bool = False
    """Gather updated weights while the next forward pass begins. Needs ``overlap_grad_reduce``."""
    num_mini_batches: PositiveInt = 1
    """Updates that a step's rows are split into. 1: strictly on-policy, as in the paper; the importance
    ratio is then 1."""
    logprob_chunk_tokens: PositiveInt = 1024
    """Tokens whose float32 logits exist at once, vocabulary / tensor-parallel size numbers each. Lower it to
    save memory."""
    max_weight_lag: NonNegativeInt = 0
    """Steps by which the weights that sampled a response may lie behind those that train on it. 0: none;
    partial rollouts and ``opd.max_teacher_lag`` need more."""
    max_grad_norm: PositiveFloat | None = None
    """Skip an update whose gradient norm, before clipping, is above this; weights and optimizer stay as they
    were. Null: no bound. Updates with a NaN or an infinity are skipped always."""
    max_skipped_updates: NonNegativeInt = 3
    """Most updates skipped in a row. One more ends the run. 0: the first ends it."""


@dataclass(kw_only=True)
class MemoryConfig:
    """Who holds a GPU's memory when. On CPU nothing moves."""

    sleep_rollouts: bool = True
    """vLLM gives its weights and KV cache back while the actor trains."""
    offload_optimizer: bool = True
    """Optimizer states wait in host memory while vLLM samples."""
    offload_gradients: bool = True
    """Gradient buffers exist during an update only."""
    offload_weights: bool = False
    """The actor's weights wait in host memory, too, while vLLM samples."""


@dataclass(kw_only=True)
class WeightSyncConfig:
    """How new weights reach vLLM."""

    bucket_bytes: PositiveInt = 256 * 1024 * 1024
    """Bytes of one streamed bucket. A sync takes at most two of them beside the weights, per rank (or of the
    largest tensor, where that is bigger)."""
