"""Settings of the update: precision, optimizer, micro-batches, memory and weight sync."""

from __future__ import annotations

from dataclasses import dataclass, field

from copd_megatron.config.bounds import number
from copd_megatron.config.schema.choices import FP8Format, FP8Recipe, LRSchedule, Recompute


@dataclass(kw_only=True)
class PrecisionConfig:
    """FP8 in the actor's decoder layers (GPU). Embedding, output layer and vision tower stay in bfloat16."""

    fp8: FP8Recipe = FP8Recipe.none
    """How FP8 matrices are scaled; ``none``: bfloat16 everywhere."""
    fp8_format: FP8Format = FP8Format.hybrid
    """Number format of forward pass and gradients."""
    num_bf16_layers_at_start: int = number(0, at_least=0)
    """First decoder layers that stay in bfloat16. Not with ``delayed``."""
    num_bf16_layers_at_end: int = number(0, at_least=0)
    """Last decoder layers that stay in bfloat16. Not with ``delayed``."""
    fp8_parameters: bool = False
    """Keep the layers' weights in FP8 only and gather them so over data-parallel ranks. The optimizer has its
    float32 copy."""


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW and its learning rate."""

    lr: float = number(1e-6, above=0)
    """Peak learning rate. The paper uses 1e-6; a tiny model needs about 1e-4 to move."""
    min_lr: float = number(0.0, at_least=0)
    """Learning rate at the end of a decay."""
    lr_schedule: LRSchedule = LRSchedule.constant
    """Decay after the warm-up, over the whole run."""
    lr_warmup_steps: int = number(0, at_least=0)
    """Optimizer steps over which the learning rate rises linearly from 0."""
    weight_decay: float = number(0.0, at_least=0)
    """Decoupled weight decay."""
    adam_beta1: float = number(0.9, at_least=0, at_most=1)
    """Decay of the first moment."""
    adam_beta2: float = number(0.999, at_least=0, at_most=1)
    """Decay of the second moment."""
    adam_eps: float = number(1e-8, above=0)
    """Added to the root of the second moment."""
    clip_grad: float = number(1.0, at_least=0)
    """Bound on the global gradient norm. 0: no clipping."""
    precision_aware: bool = False
    """Keep gradients, master weights and moments in the types below (Transformer Engine's Adam). False: all
    in float32."""
    main_grads_dtype: str = "float32"
    """Type of accumulated gradients: float32 or bfloat16."""
    main_params_dtype: str = "float32"
    """Type of master weights: float32 or float16."""
    moments_dtype: str = "float32"
    """Type of both moments: float32, bfloat16, float16 or uint8 (FP8 with a scale)."""
    cpu_offload_fraction: float = number(0.0, at_least=0, at_most=1)
    """Share of the optimizer's states that lives, and is stepped, in host memory."""


@dataclass(kw_only=True)
class TrainingConfig:
    """How a step's rows are computed."""

    micro_batch_tokens: int = number(16384, at_least=1)
    """Token budget of a micro-batch, padding included, on one data- and context-parallel rank."""
    sequence_packing: bool = True
    """Rows of a micro-batch follow each other without padding. False: padded to the longest."""
    recompute: Recompute = Recompute.none
    """Which activations the backward pass computes again to save memory."""
    recompute_modules: list[str] = field(default_factory=lambda: ["core_attn"])
    """For ``selective``: core_attn, mlp; in mixtures also moe, moe_act. Fused attention on a GPU keeps little
    anyway."""
    recompute_num_layers: int = number(1, at_least=1)
    """Layers between two kept activations, for ``full``."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over data-parallel ranks while the backward pass runs."""
    overlap_param_gather: bool = False
    """Gather updated weights while the next forward pass begins. Needs ``overlap_grad_reduce``."""
    num_mini_batches: int = number(1, at_least=1)
    """Optimizer steps that a step's batch is divided into. 1: strictly on-policy."""
    logprob_chunk_tokens: int = number(1024, at_least=1)
    """Rows of [tokens, vocab / TP] float32 logits that exist at once."""
    max_weight_lag: int = number(0, at_least=0)
    """How many weight versions older than the actor a rollout may be when it is trained on."""
    max_grad_norm: float | None = number(None, above=0)
    """An update whose gradient norm before clipping is above this is skipped, as is always one with a NaN or
    an infinity: weights and optimizer stay as they were. Null: no such bound."""
    max_skipped_updates: int = number(3, at_least=0)
    """Most updates skipped in a row; one more ends the run."""


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
    """The actor's weights wait in host memory too while vLLM samples."""


@dataclass(kw_only=True)
class WeightSyncConfig:
    """How new weights reach vLLM."""

    bucket_bytes: int = number(256 * 1024 * 1024, at_least=1)
    """Bytes of one streamed bucket. A sync needs at most two buckets of extra memory per rank, or twice the
    largest tensor if that is bigger."""
