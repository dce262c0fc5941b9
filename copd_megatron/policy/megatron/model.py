"""One branch's Megatron model: process groups, transformer configuration, layer spec, GPT model.

The same code builds the CPU model (local layer spec, float32, Gloo) and the CUDA model (Transformer Engine
spec, bfloat16, NCCL).
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
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
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from torch import nn

from copd_megatron.config.schema import ParallelConfig, PrecisionConfig, TrainingConfig
from copd_megatron.hf.companions import read_json
from copd_megatron.model.shape import ModelShape
from copd_megatron.policy.megatron.attention import PackedAttention
from copd_megatron.policy.megatron.few_passes import Swiglu
from copd_megatron.policy.megatron.media_sequences import turning
from copd_megatron.policy.megatron.norm import RMSNorm
from copd_megatron.policy.megatron.settings import (
    fused_weight_gradient,
    precision_fields,
    recompute_fields,
)
from copd_megatron.policy.megatron.text import TextModel
from copd_megatron.policy.megatron.vision import VisionLanguageModel


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
        expert_tensor_parallel_size=1,  # an expert lies whole on its rank
        virtual_pipeline_model_parallel_size=_virtual(parallel),
    )
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def _virtual(parallel: ParallelConfig) -> int | None:
    """Megatron's way of saying how many model chunks a stage has."""
    size = parallel.virtual_pipeline_model_parallel_size
    return size if size > 1 else None


def padded_vocab(dims: ModelShape, tp_size: int) -> int:
    """Rows of the embedding over all tensor-parallel ranks: the vocabulary, filled up to a multiple."""
    return math.ceil(dims.vocab_size / tp_size) * tp_size


def transformer_config(
    dims: ModelShape,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    training: TrainingConfig | None = None,
    precision: PrecisionConfig | None = None,
) -> TransformerConfig:
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
        "virtual_pipeline_model_parallel_size": _virtual(parallel),
        "context_parallel_size": parallel.context_parallel_size,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "sequence_parallel": parallel.sequence_parallel,
        # micro-batches differ in length; the stages tell each other the shape
        "variable_seq_lengths": parallel.pipeline_model_parallel_size > 1
        and (on_cuda or dims.num_experts is None),
        # the loss comes fully normalised (records.TrainRow): Megatron must only sum
        "calculate_per_token_loss": True,
        "gradient_accumulation_fusion": on_cuda and fused_weight_gradient(),
        **recompute_fields(training or TrainingConfig()),
        **precision_fields(precision or PrecisionConfig()),
    }
    if _virtual(parallel):
        # with two stages the next one is also the one before: without overlap, Megatron would send forward
        # and backward tensors at once, to the same rank, and each would be taken for the other
        settings |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    # a dense model has no use for it, but Megatron's default refuses micro-batches of different length
    settings["moe_token_dispatcher_type"] = "alltoall"
    if dims.num_experts is not None:
        settings |= _expert_settings(dims, on_cuda)
    if on_cuda:
        settings |= {
            "bias_activation_fusion": True,
            "bias_dropout_fusion": True,
            "apply_rope_fusion": True,
        }
    else:
        settings |= {
            "use_cpu_initialization": True,
            "masked_softmax_fusion": False,
            "bias_activation_fusion": False,
            "bias_dropout_fusion": False,
            "persist_layer_norm": False,
            "apply_rope_fusion": False,
            # Megatron's way to an activation function that takes both halves; a mixture's takes one
            "use_te_activation_func": dims.num_experts is None,
        }
    return TransformerConfig(**settings)


def _expert_settings(dims: ModelShape, on_cuda: bool) -> dict[str, Any]:
    """Megatron's configuration of Qwen3's experts: no shared ones, no balancing loss in a policy update."""
    return {
        "num_moe_experts": dims.num_experts,
        "moe_ffn_hidden_size": dims.expert_ffn_size,
        "moe_router_topk": dims.num_experts_per_token,
        # softmax over the chosen ones is what normalising their softmax over all comes to
        "moe_router_pre_softmax": not dims.normalize_expert_weights,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_router_dtype": "fp32",
        "moe_grouped_gemm": on_cuda,
        # The all-to-all dispatcher makes CUDA streams. The all-gather one wants equally many tokens on all
        # ranks and in all micro-batches, which ``MegatronActor`` sees to.
        "moe_token_dispatcher_type": "alltoall" if on_cuda else "allgather",
        "expert_tensor_parallel_size": 1,
    }


def layer_spec(
    config: TransformerConfig, vp_stage: int | None = None, *, share_prompts: bool = False
) -> ModuleSpec | TransformerBlockSubmodules:
    """Transformer Engine's layers on CUDA, Megatron's own on CPU; the checkpoint keys are the same."""
    angles_in_pack = share_prompts or config.mrope_section is not None
    if torch.cuda.is_available():
        spec = get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts, moe_grouped_gemm=config.moe_grouped_gemm, qk_layernorm=True
        )
        attention = spec.submodules.self_attention.submodules
        if angles_in_pack:
            attention.core_attention = turning(attention.core_attention)
        return spec
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=True, normalization="RMSNorm"
    )
    # Megatron's own core attention refuses packed sequences, its norms sequence parallelism
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    attention.core_attention = turning(PackedAttention)
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention.q_layernorm = attention.k_layernorm = RMSNorm
    if config.num_moe_experts is None:
        parts = layer.mlp.keywords["submodules"]
        layer.mlp = partial(layer.mlp.func, submodules=replace(parts, activation_func=Swiglu))
    if config.num_moe_experts is not None:  # there is no linear layer for the norm's weight to hide in
        layer.sharded_state_dict_keys_map = {
            key: value
            for key, value in layer.sharded_state_dict_keys_map.items()
            if not key.startswith("pre_mlp")
        }
    return TransformerBlockSubmodules(
        layer_specs=[spec] * get_num_layers_to_build(config, vp_stage), layer_norm=RMSNorm
    )


class ModelChunks(nn.ModuleList):
    """The chunks of a pipeline stage under a virtual pipeline, as one module to save and count."""

    def sharded_state_dict(self, prefix: str = "", **kwargs: Any) -> dict[str, Any]:
        """Every chunk's; the entries' names here say which chunk's they are, their keys do not."""
        return {
            f"{prefix}{number}.{name}": entry
            for number, chunk in enumerate(list[Any](self))
            for name, entry in chunk.sharded_state_dict(prefix="", **kwargs).items()
        }


def build_chunks(
    dims: ModelShape,
    config: TransformerConfig,
    max_tokens: int,
    *,
    model_path: str | Path,
    freeze_vision: bool = False,
    share_prompts: bool = False,
) -> list[GPTModel]:
    """This rank's pipeline stage, one model per chunk, uninitialised weights on the right device.

    ``model_path`` gives the vision tower's configuration, where the model has one. ``share_prompts``: it is
    to compute packs whose rows share prompts.
    """
    stages = range(config.virtual_pipeline_model_parallel_size or 1)
    return [
        _build_chunk(
            dims,
            config,
            max_tokens,
            model_path,
            freeze_vision,
            share_prompts,
            vp_stage=stage if config.virtual_pipeline_model_parallel_size else None,
        )
        for stage in stages
    ]


def _build_chunk(
    dims: ModelShape,
    config: TransformerConfig,
    max_tokens: int,
    model_path: str | Path,
    freeze_vision: bool,
    share_prompts: bool,
    *,
    vp_stage: int | None,
) -> GPTModel:
    settings: dict[str, Any] = {
        "config": config,
        "transformer_layer_spec": layer_spec(config, vp_stage, share_prompts=share_prompts),
        "vocab_size": padded_vocab(dims, config.tensor_model_parallel_size),
        "max_sequence_length": max_tokens,
        "pre_process": parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        "post_process": parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        "vp_stage": vp_stage,
        "parallel_output": True,
        "share_embeddings_and_output_weights": dims.tie_word_embeddings,
        "rotary_base": int(dims.rope_theta),
    }
    if dims.vision is None:
        kind = GPTModel if config.apply_rope_fusion and not share_prompts else TextModel
        model = kind(position_embedding_type="rope", **settings)
    else:
        vision_config = (read_json(Path(model_path), "config.json") or {})["vision_config"]
        model = VisionLanguageModel(vision_config=vision_config, freeze_vision=freeze_vision, **settings)
    if torch.cuda.is_available():
        model.cuda(torch.cuda.current_device())
    return model
