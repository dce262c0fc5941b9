"""A rough estimate of the memory of one rank, from sizes alone: needs neither torch nor a GPU.

Symbols: ``L`` layers, ``h`` hidden size, ``f`` feed-forward width used per token, ``q`` / ``g`` query heads /
query groups times head size, ``V`` vocabulary, ``t`` / ``p`` / ``d`` / ``c`` / ``e`` tensor, pipeline, data,
context and expert parallel sizes, ``b`` bytes of the compute type (4 or 2), ``T`` micro_batch_tokens, ``S``
max_sequence_tokens.

    P       = (L/p * dense layer weights + embeddings of the stage) / t + L/p * expert weights / e
              + vision tower, on the fullest stage. The first stage holds the embedding and the tower, which
              is not split; the last stage holds the output layer (a copy, if it is tied to the embedding)
    weights = b P                                   (1 byte for layers in FP8, precision.fp8_parameters)
    grads   = 4 P                                   (2 P with optimizer.main_grads_dtype bfloat16)
    adam    = 8 P / (d c)  (+ 4 P / (d c) with b = 2)   two moments, and the float32 master weights; the
                                                    distributed optimizer shards both over d and c (those of
                                                    experts over t d c / e). Other types with
                                                    optimizer.precision_aware; minus the part that
                                                    optimizer.cpu_offload_fraction keeps in host memory
    layer   = b T (4 h / s + (4 q + 4 g + 4 f) / t)  activations of a decoder layer for the backward pass;
                                                    s = t with sequence parallelism, else 1
              + b T 2 S heads / t                   on CPU only: attention scores and their softmax
    acts    = L layer                               1F1B keeps up to p micro-batches of L/p layers on the
                                                    first stage, hence L
              L / n b T h / s + n layer             with training.recompute full and n recompute_num_layers
              L (layer - ffn) + ffn                 with selective, and mlp or moe in recompute_modules; ffn
                                                    is the term 4 f of one layer
    logits  = 3 * 4 * logprob_chunk_tokens V / t    float32 logits, softmax and gradient of one chunk
    extras  = b P for the base model (kl_coefficient > 0, or extrapolation) and for a teacher snapshot, each;
              4 P for a moving average
    sync    = 2 bucket_bytes                        or twice one layer's experts, if a folder stacks them
    vLLM    = b weights / rollout_tp + KV cache on CPU; on a GPU, gpu_memory_utilization covers both
              (1 byte per weight with rollout.quantization fp8)

A frozen branch has neither gradients nor optimizer and keeps no activations. On a GPU the actor and vLLM take
turns: memory that one releases while the other works (config section ``memory``) counts once. Not counted:
fragmentation of the allocator, NCCL buffers, the CUDA context, and the Python process itself (about 1 GiB
with torch and vLLM).
"""

from __future__ import annotations

from dataclasses import dataclass

from copd_megatron.config.schema import BranchConfig, Config, Recompute, RolloutQuantization, TeacherMode
from copd_megatron.model.shape import ModelShape

GIB = 1024**3
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "uint8": 1}


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on the rank of one branch that needs most."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    extra_models: int
    """Reference model and teacher snapshot."""
    weight_sync: int
    rollout: int
    """vLLM's weights and, on CPU, its KV cache."""
    given_to_rollout: int = 0
    """The part of weights, gradients and optimizer that is in host memory while vLLM works."""
    rollout_sleeps: bool = False
    """Whether vLLM releases its memory while the actor works."""

    @property
    def training(self) -> int:
        """Needed while the actor works, without vLLM."""
        return (
            self.weights
            + self.gradients
            + self.optimizer
            + self.activations
            + self.logits
            + self.extra_models
            + self.weight_sync
        )

    @property
    def sampling(self) -> int:
        """Needed while vLLM works, including what the actor does not release."""
        kept = self.weights + self.gradients + self.optimizer + self.extra_models - self.given_to_rollout
        return kept + self.weight_sync + self.rollout

    @property
    def total(self) -> int:
        """The larger of the two turns, or both together if vLLM keeps its memory."""
        if self.rollout_sleeps:
            return max(self.training, self.sampling)
        return self.training + self.rollout


def compute_bytes(config: Config, *, on_gpu: bool) -> int:
    """Bytes per number in ``model.dtype``."""
    dtype = config.model.dtype
    if dtype == "auto":
        dtype = "bfloat16" if on_gpu else "float32"
    return 2 if dtype == "bfloat16" else 4


def stage_parameters(shape: ModelShape, *, pipeline: int, tensor: int, expert: int = 1) -> int:
    """``P``: weights on one rank of the fullest pipeline stage."""
    return sum(_dense_and_experts(shape, pipeline=pipeline, tensor=tensor, expert=expert))


def _dense_and_experts(shape: ModelShape, *, pipeline: int, tensor: int, expert: int) -> tuple[int, int]:
    experts = _expert_parameters(shape)
    layers = shape.num_layers // pipeline
    embeddings = shape.embedding_parameters
    if pipeline == 1 and not shape.tie_word_embeddings:
        embeddings *= 2
    dense = layers * (shape.layer_parameters - experts) + embeddings + shape.hidden_size
    vision = 0 if shape.vision is None else shape.vision.num_parameters
    return dense // tensor + vision, layers * experts // expert


def _expert_parameters(shape: ModelShape) -> int:
    """Number of weights in one layer's experts."""
    return 3 * (shape.num_experts or 0) * shape.hidden_size * shape.expert_ffn_size


def estimate_memory(
    config: Config, branch: BranchConfig, shape: ModelShape, *, on_gpu: bool
) -> MemoryEstimate:
    """The formula above for one branch.

    Args:
        config: a validated config.
        branch: one of its branches.
        shape: that branch's model.
        on_gpu: bfloat16 by default, and fused attention; otherwise float32, and attention scores are kept.
    """
    parallel, memory = branch.parallel, config.memory
    tensor, experts_over = parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size
    dense, experts = _dense_and_experts(
        shape, pipeline=parallel.pipeline_model_parallel_size, tensor=tensor, expert=experts_over
    )
    parameters, copies = dense + experts, parallel.data_parallel_size * parallel.context_parallel_size
    size = compute_bytes(config, on_gpu=on_gpu)
    trains = not branch.frozen

    weights = (1 if config.precision.fp8_parameters else size) * parameters
    gradients = _gradient_bytes(config) * parameters if trains else 0
    spread = dense / copies + experts * experts_over / (tensor * copies)
    optimizer = int(_optimizer_bytes(config, size) * spread) if trains else 0
    bucket = max(config.weight_sync.bucket_bytes, size * _expert_parameters(shape) * shape.stacks_experts)
    given = 0
    if on_gpu:
        given += weights if memory.offload_weights else 0
        given += gradients if memory.offload_gradients else 0
        given += optimizer if memory.offload_optimizer else 0
    return MemoryEstimate(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=_activation_bytes(config, branch, shape, size, on_gpu=on_gpu),
        logits=3 * 4 * config.training.logprob_chunk_tokens * shape.vocab_size // tensor,
        extra_models=_extra_model_bytes(config, size) * parameters if trains else 0,
        weight_sync=2 * bucket if trains else 0,
        rollout=_rollout_bytes(branch, shape, size, on_gpu=on_gpu) if trains else 0,
        given_to_rollout=given,
        rollout_sleeps=on_gpu and memory.sleep_rollouts and trains,
    )


def _rollout_bytes(branch: BranchConfig, shape: ModelShape, size: int, *, on_gpu: bool) -> int:
    """vLLM's weights and, on CPU, its KV cache."""
    quantized = branch.rollout.quantization is RolloutQuantization.fp8
    weights = (1 if quantized else size) * shape.num_parameters // branch.rollout.tensor_parallel_size
    return weights if on_gpu else weights + int(branch.rollout.cpu_kv_cache_gib * GIB)


def _activation_bytes(
    config: Config, branch: BranchConfig, shape: ModelShape, size: int, *, on_gpu: bool
) -> int:
    """``acts``; for one layer only, if nothing is kept for a backward pass."""
    training, tensor = config.training, branch.parallel.tensor_model_parallel_size
    shared = tensor if branch.parallel.sequence_parallel else 1
    query = shape.num_attention_heads * shape.head_dim
    groups = shape.num_query_groups * shape.head_dim
    ffn = shape.num_experts_per_token * shape.expert_ffn_size if shape.num_experts else shape.ffn_hidden_size
    per_token = 4 * shape.hidden_size // shared + (4 * query + 4 * groups + 4 * ffn) // tensor
    if not on_gpu and training.recompute is not Recompute.selective:
        per_token += 2 * config.model.max_sequence_tokens * shape.num_attention_heads // tensor
    layer = size * training.micro_batch_tokens * per_token
    if branch.frozen:
        return layer
    if training.recompute is Recompute.selective and {"mlp", "moe"} & set(training.recompute_modules):
        again = size * training.micro_batch_tokens * 4 * ffn // tensor
        return shape.num_layers * (layer - again) + again
    if training.recompute is Recompute.full:
        inputs = size * training.micro_batch_tokens * shape.hidden_size // shared
        count = training.recompute_num_layers
        return -(-shape.num_layers // count) * inputs + min(count, shape.num_layers) * layer
    return shape.num_layers * layer


def _extra_model_bytes(config: Config, size: int) -> int:
    """Bytes per parameter of copies of the model that a training branch keeps. A frozen branch never changes,
    so it needs neither the base model nor a snapshot."""
    base = config.loss.kl_coefficient > 0 or config.opd.extrapolation != 1
    mode = config.opd.teacher_mode if config.schedule.opd_steps > 0 else TeacherMode.live
    snapshot = {TeacherMode.live: 0, TeacherMode.ema: 4}.get(mode, size)
    return size * base + snapshot


def _gradient_bytes(config: Config) -> int:
    options = config.optimizer
    return _DTYPE_BYTES[options.main_grads_dtype] if options.precision_aware else 4


def _optimizer_bytes(config: Config, size: int) -> float:
    """Bytes per weight on the device: two moments, and a master weight if the compute type is narrower."""
    options = config.optimizer
    master, moment = 4, 4
    if options.precision_aware:
        master, moment = _DTYPE_BYTES[options.main_params_dtype], _DTYPE_BYTES[options.moments_dtype]
    return (2 * moment + (master if size == 2 else 0)) * (1.0 - options.cpu_offload_fraction)
