"""One branch's Megatron model: process groups, transformer configuration, layer spec, GPT model.

The same code builds the CPU model (local layer spec, float32, Gloo) and the CUDA model (Transformer Engine
spec, bfloat16, NCCL).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec

from copd_megatron.config.model_shape import ModelShape
from copd_megatron.config.schema import ParallelConfig
from copd_megatron.policy.packed_attention import PackedAttention
from copd_megatron.policy.vision import VisionLanguageModel


def initialize_parallel(parallel: ParallelConfig, seed: int) -> None:
    """Carves the branch's default process group into Megatron's groups and seeds its random streams.

    Raises:
        ValueError: the process group does not have as many ranks as the layout asks for.
    """
    if dist.get_world_size() != parallel.world_size:
        raise ValueError(
            f"branch process group has {dist.get_world_size()} ranks, its layout needs {parallel.world_size}"
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
    )
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def padded_vocab(dims: ModelShape, tp_size: int) -> int:
    """Rows of the embedding over all tensor-parallel ranks: the vocabulary, filled up to a multiple."""
    return math.ceil(dims.vocab_size / tp_size) * tp_size


def transformer_config(dims: ModelShape, parallel: ParallelConfig, dtype: torch.dtype) -> TransformerConfig:
    """Megatron's configuration of a Qwen3 decoder, for CPU or CUDA by what torch sees."""
    on_cuda = torch.cuda.is_available()
    settings: dict[str, Any] = {
        "num_layers": dims.num_layers,
        "hidden_size": dims.hidden_size,
        "ffn_hidden_size": dims.ffn_hidden_size,
        "num_attention_heads": dims.num_attention_heads,
        "num_query_groups": dims.num_query_groups,
        "kv_channels": dims.head_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": dims.norm_eps,
        "qk_layernorm": True,
        "mrope_section": None if dims.mrope_section is None else list(dims.mrope_section),
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "attention_softmax_in_fp32": True,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "context_parallel_size": parallel.context_parallel_size,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "sequence_parallel": parallel.sequence_parallel,
        # micro-batches differ in length; the stages tell each other the shape
        "variable_seq_lengths": parallel.pipeline_model_parallel_size > 1,
        # the loss comes fully normalised (records.TrainRow): Megatron must only sum
        "calculate_per_token_loss": True,
        "gradient_accumulation_fusion": False,
        # the all-gather dispatcher refuses micro-batches of different length
        "moe_token_dispatcher_type": "alltoall",
    }
    if not on_cuda:
        settings |= {
            "use_cpu_initialization": True,
            "masked_softmax_fusion": False,
            "bias_activation_fusion": False,
            "bias_dropout_fusion": False,
            "persist_layer_norm": False,
            "apply_rope_fusion": False,
        }
    return TransformerConfig(**settings)


def layer_spec() -> ModuleSpec:
    """Transformer Engine's layers on CUDA, Megatron's own on CPU; the checkpoint keys are the same."""
    if torch.cuda.is_available():
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=True)
    spec = get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm")
    # Megatron's own core attention refuses packed sequences
    spec.submodules.self_attention.submodules.core_attention = PackedAttention
    return spec


def build_model(
    dims: ModelShape,
    config: TransformerConfig,
    max_tokens: int,
    *,
    model_path: str | Path,
    freeze_vision: bool = False,
) -> GPTModel:
    """This rank's pipeline stage, uninitialised weights on the right device.

    ``model_path`` gives the vision tower's configuration, where the model has one.
    """
    settings: dict[str, Any] = {
        "config": config,
        "transformer_layer_spec": layer_spec(),
        "vocab_size": padded_vocab(dims, config.tensor_model_parallel_size),
        "max_sequence_length": max_tokens,
        "pre_process": parallel_state.is_pipeline_first_stage(),
        "post_process": parallel_state.is_pipeline_last_stage(),
        "parallel_output": True,
        "share_embeddings_and_output_weights": dims.tie_word_embeddings,
        "rotary_base": int(dims.rope_theta),
    }
    if dims.vision is None:
        model = GPTModel(position_embedding_type="rope", **settings)
    else:
        vision_config = json.loads((Path(model_path) / "config.json").read_text())["vision_config"]
        model = VisionLanguageModel(vision_config=vision_config, freeze_vision=freeze_vision, **settings)
    if torch.cuda.is_available():
        model.cuda(torch.cuda.current_device())
    return model
