"""A rough estimate of one rank's memory, from sizes alone: no torch, no GPU.

Symbols: ``L`` layers, ``h`` hidden size, ``f`` feed-forward width, ``q`` / ``g`` query heads / query groups
times head size, ``V`` vocabulary, ``t`` / ``p`` / ``d`` tensor, pipeline and data parallel sizes, ``b`` bytes
of the compute type (4 or 2), ``T`` micro_batch_tokens, ``S`` max_sequence_tokens.

    P       = (L/p * layer weights + embeddings of the stage) / t + vision tower, on the fullest stage. A
              stage holds the embedding and the tower, which is not split, when it is the first, the output
              layer when it is the last (a tied one is a copy)
    weights = b P
    grads   = 4 P                                   Megatron accumulates gradients in float32
    adam    = 8 P / d  (+ 4 P / d with b = 2)       two moments, and the float32 master weights;
                                                    the distributed optimizer spreads both over d
    acts    = b T L (4 h + (4 q + 4 g + 4 f) / t)   what a decoder layer keeps for the backward pass, no
                                                    recomputation; 1F1B keeps up to p micro-batches of
                                                    L/p layers on the first stage, hence L
              + b T L 2 S heads / t                 on CPU only: attention scores and their softmax
    logits  = 3 * 4 * logprob_chunk_tokens V / t    float32 logits, softmax and gradient of one chunk
    extras  = b P for the reference model (kl_coefficient > 0) and for a teacher snapshot, each
    sync    = 2 bucket_bytes
    vLLM    = b weights / rollout_tp + KV cache on CPU; on a GPU, gpu_memory_utilization of it covers both

A frozen branch has neither gradients nor optimizer and keeps no activations. Left out: the allocator's
fragmentation, NCCL buffers, CUDA context, the Python process itself (about 1 GiB with torch and vLLM).
"""

from __future__ import annotations

from dataclasses import dataclass

from copd_megatron.config.model_shape import ModelShape
from copd_megatron.config.schema import BranchConfig, Config, TeacherMode

GIB = 1024**3


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on the fullest rank of one branch."""

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

    @property
    def total(self) -> int:
        return (
            self.weights
            + self.gradients
            + self.optimizer
            + self.activations
            + self.logits
            + self.extra_models
            + self.weight_sync
            + self.rollout
        )


def compute_bytes(config: Config, *, on_gpu: bool) -> int:
    """Bytes of one number in ``model.dtype``."""
    dtype = config.model.dtype
    if dtype == "auto":
        dtype = "bfloat16" if on_gpu else "float32"
    return 2 if dtype == "bfloat16" else 4


def stage_parameters(shape: ModelShape, *, pipeline: int, tensor: int) -> int:
    """``P``: weights on one rank of the fullest pipeline stage."""
    layers = shape.num_layers // pipeline * shape.layer_parameters
    embeddings = shape.embedding_parameters
    if pipeline == 1 and not shape.tie_word_embeddings:
        embeddings *= 2
    vision = 0 if shape.vision is None else shape.vision.num_parameters
    return (layers + embeddings + shape.hidden_size) // tensor + vision


def estimate_memory(
    config: Config, branch: BranchConfig, shape: ModelShape, *, on_gpu: bool
) -> MemoryEstimate:
    """The formula above for one branch.

    Args:
        config: a validated config.
        branch: one of its branches.
        shape: that branch's model.
        on_gpu: bfloat16 by default and fused attention; otherwise float32 and attention scores kept.
    """
    parallel = branch.parallel
    tensor = parallel.tensor_model_parallel_size
    parameters = stage_parameters(shape, pipeline=parallel.pipeline_model_parallel_size, tensor=tensor)
    size = compute_bytes(config, on_gpu=on_gpu)
    trains = not branch.frozen

    query = shape.num_attention_heads * shape.head_dim
    groups = shape.num_query_groups * shape.head_dim
    per_token = 4 * shape.hidden_size + (4 * query + 4 * groups + 4 * shape.ffn_hidden_size) // tensor
    if not on_gpu:
        per_token += 2 * config.model.max_sequence_tokens * shape.num_attention_heads // tensor
    activations = size * config.training.micro_batch_tokens * shape.num_layers * per_token

    extra_models = int(config.loss.kl_coefficient > 0 and trains)
    extra_models += int(config.opd.teacher_mode is not TeacherMode.live and config.schedule.opd_steps > 0)

    adam = 8 + (4 if size == 2 else 0)
    rollout = size * shape.num_parameters // branch.rollout.tensor_parallel_size
    if not on_gpu:
        rollout += int(branch.rollout.cpu_kv_cache_gib * GIB)
    return MemoryEstimate(
        weights=size * parameters,
        gradients=4 * parameters if trains else 0,
        optimizer=adam * parameters // parallel.data_parallel_size if trains else 0,
        activations=activations if trains else activations // shape.num_layers,
        logits=3 * 4 * config.training.logprob_chunk_tokens * shape.vocab_size // tensor,
        extra_models=size * parameters * extra_models,
        weight_sync=2 * config.weight_sync.bucket_bytes,
        rollout=rollout,
    )
