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
                                                    s = t with sequence parallelism, else 1; on a CPU 1.3
                                                    times as much, since unfused operations keep more
              + b T 2 S heads / t                   on CPU only: attention scores and their softmax
    acts    = L layer                               1F1B keeps up to p micro-batches of L/p layers on the
                                                    first stage, hence L
              L / n b T h / s + n layer             with training.recompute full and n recompute_num_layers
              L (layer - ffn) + ffn                 with selective, and mlp or moe in recompute_modules; ffn
                                                    is the term 4 f of one layer
    logits  = 3 * 4 * logprob_chunk_tokens V / t    float32 logits, softmax and gradient of one chunk
    extras  = b P for the base model (kl_coefficient > 0, or extrapolation) and for a teacher snapshot, each;
              4 P for a moving average. On a GPU they lie in host memory
    sync    = 2 bucket_bytes                        or twice one layer's experts, if a folder stacks them
    media   = (4 C t p^2 + b depth (10 w + 2 f)) patches   pixels of the largest image or video, and the
              vision tower's activations; w, f its widths. With training.recompute full
              b (depth w + 10 w + 2 f), with model.freeze_vision those of one block
    vLLM    = b weights / rollout_tp                (1 byte per weight with quantization fp8); on a CPU
                                                    twice: as they are, and packed for its kernels
    KV      = cpu_kv_cache_gib on a CPU; on a GPU the rest of gpu_memory_utilization, if its size is known

A frozen branch has neither gradients nor optimizer and keeps no activations. On a GPU the actor and vLLM take
turns: memory that one releases while the other works (config section ``memory``) counts once. Not counted:
fragmentation of the allocator, NCCL buffers, the CUDA context, and the Python process itself (about 1 GiB
with torch and vLLM); ``planner/machines.yaml`` has a figure for them.
"""

from __future__ import annotations

from dataclasses import dataclass

from copd_megatron.config.schema import BranchConfig, Config, Recompute, RolloutQuantization, TeacherMode
from copd_megatron.model.shape import ModelShape

GIB = 1024**3
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "uint8": 1}


_CPU_KEEPS = 1.3
"""What a layer keeps on a CPU, as a multiple of the formula for a GPU: unfused operations keep their
intermediate results. Measured by ``tools/bench_plan.py``."""


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """The largest micro-batch of a step."""

    tokens: float
    row_tokens: float
    """Of a row, weighted by the rows' tokens."""
    response_tokens: float


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
    engine_weights: int
    """vLLM's copy of the weights."""
    kv_cache: int
    """vLLM's; 0 on a GPU of unknown size."""
    media: int = 0
    """Pixels of the largest image or video, and what the vision tower keeps of them."""
    extras_in_host: bool = False
    """Whether ``extra_models`` lie in host memory instead."""
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
            + self._extras
            + self.media
            + self.weight_sync
        )

    @property
    def rollout(self) -> int:
        """vLLM's weights and KV cache."""
        return self.engine_weights + self.kv_cache

    @property
    def host(self) -> int:
        """Host memory that a rank of a GPU job takes: copies of the model, and what waits there."""
        return (self.extra_models if self.extras_in_host else 0) + self.given_to_rollout

    @property
    def _extras(self) -> int:
        return 0 if self.extras_in_host else self.extra_models

    @property
    def sampling(self) -> int:
        """Needed while vLLM works, including what the actor does not release."""
        kept = self.weights + self.gradients + self.optimizer + self._extras - self.given_to_rollout
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


def rank_parameters(shape: ModelShape, branch: BranchConfig) -> tuple[int, int]:
    """Weights on one rank of a branch's fullest pipeline stage: dense ones, and those of experts."""
    parallel = branch.parallel
    return _dense_and_experts(
        shape,
        pipeline=parallel.pipeline_model_parallel_size,
        tensor=parallel.tensor_model_parallel_size,
        expert=parallel.expert_model_parallel_size,
    )


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
    config: Config,
    branch: BranchConfig,
    shape: ModelShape,
    *,
    on_gpu: bool,
    gpu_bytes: int | None = None,
    batch: MicroBatch | None = None,
) -> MemoryEstimate:
    """The formula above for one branch.

    Args:
        config: a validated config.
        branch: one of its branches.
        shape: that branch's model.
        on_gpu: bfloat16 by default, and fused attention; otherwise float32, and attention scores are kept.
        gpu_bytes: memory of a GPU, of which vLLM takes a share; None: not known, and no KV cache is counted.
        batch: the largest micro-batch, where lengths are known; None: a full one of rows of full length.
    """
    parallel, memory = branch.parallel, config.memory
    tensor, experts_over = parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size
    dense, experts = rank_parameters(shape, branch)
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
        activations=_activation_bytes(config, branch, shape, size, batch, on_gpu=on_gpu),
        logits=int(3 * 4 * _chunk_tokens(config, batch) * shape.vocab_size) // tensor,
        extra_models=_extra_model_bytes(config, size) * parameters if trains else 0,
        weight_sync=2 * bucket if trains else 0,
        engine_weights=_engine_bytes(branch, shape, size) * (1 if on_gpu else 2) if trains else 0,
        kv_cache=_kv_cache_bytes(branch, shape, size, on_gpu=on_gpu, gpu_bytes=gpu_bytes) if trains else 0,
        media=_media_bytes(config, shape, size),
        extras_in_host=on_gpu,
        given_to_rollout=given,
        rollout_sleeps=on_gpu and memory.sleep_rollouts and trains,
    )


def _engine_bytes(branch: BranchConfig, shape: ModelShape, size: int) -> int:
    """vLLM's weights on one rank."""
    quantized = branch.rollout.quantization is RolloutQuantization.fp8
    return (1 if quantized else size) * shape.num_parameters // branch.rollout.tensor_parallel_size


def _kv_cache_bytes(
    branch: BranchConfig, shape: ModelShape, size: int, *, on_gpu: bool, gpu_bytes: int | None
) -> int:
    """What vLLM's share of a GPU leaves beside its weights; on a CPU what is set."""
    if not on_gpu:
        return int(branch.rollout.cpu_kv_cache_gib * GIB)
    if gpu_bytes is None:
        return 0
    share = int(branch.rollout.gpu_memory_utilization * gpu_bytes)
    return max(share - _engine_bytes(branch, shape, size), 0)


def _media_bytes(config: Config, shape: ModelShape, size: int) -> int:
    """``media``, of the largest item that the settings allow; 0 where they set no limit."""
    tower = shape.vision
    pixels = max(config.media.image_max_pixels or 0, config.media.video_max_pixels or 0)
    if tower is None or not pixels:
        return 0
    patches = pixels / tower.patch_size**2
    if config.media.video_max_pixels == pixels:
        patches /= tower.temporal_patch_size
    patches = min(patches, config.model.max_sequence_tokens * tower.spatial_merge_size**2)
    values = tower.in_channels * tower.temporal_patch_size * tower.patch_size**2
    block = 10 * tower.hidden_size + 2 * tower.ffn_hidden_size
    kept = tower.depth * block
    if config.model.freeze_vision:
        kept = block
    elif config.training.recompute is Recompute.full:
        kept = tower.depth * tower.hidden_size + block
    return int(patches * (4 * values + size * kept))


def _chunk_tokens(config: Config, batch: MicroBatch | None) -> float:
    """Response tokens whose logits exist at once."""
    chunk = config.training.logprob_chunk_tokens
    return chunk if batch is None else min(chunk, batch.response_tokens)


def _activation_bytes(
    config: Config,
    branch: BranchConfig,
    shape: ModelShape,
    size: int,
    batch: MicroBatch | None,
    *,
    on_gpu: bool,
) -> int:
    """``acts``; for one layer only, if nothing is kept for a backward pass."""
    tokens = config.training.micro_batch_tokens if batch is None else batch.tokens
    row = config.model.max_sequence_tokens if batch is None else batch.row_tokens
    size_kept = size if on_gpu else size * _CPU_KEEPS
    training, tensor = config.training, branch.parallel.tensor_model_parallel_size
    shared = tensor if branch.parallel.sequence_parallel else 1
    query = shape.num_attention_heads * shape.head_dim
    groups = shape.num_query_groups * shape.head_dim
    ffn = shape.num_experts_per_token * shape.expert_ffn_size if shape.num_experts else shape.ffn_hidden_size
    per_token = 4 * shape.hidden_size / shared + (4 * query + 4 * groups + 4 * ffn) / tensor
    if not on_gpu and training.recompute is not Recompute.selective:
        per_token += 2 * row * shape.num_attention_heads / tensor
    layer = size_kept * tokens * per_token
    if branch.frozen:
        return int(layer)
    if training.recompute is Recompute.selective and {"mlp", "moe"} & set(training.recompute_modules):
        again = size_kept * tokens * 4 * ffn / tensor
        return int(shape.num_layers * (layer - again) + again)
    if training.recompute is Recompute.full:
        inputs = size * tokens * shape.hidden_size / shared
        count = training.recompute_num_layers
        return int(-(-shape.num_layers // count) * inputs + min(count, shape.num_layers) * layer)
    return int(shape.num_layers * layer)


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
