"""How a Hugging Face checkpoint's tensors lie on a Megatron branch. Pure: no torch, no Megatron.

Every Hugging Face tensor is owned, on each pipeline stage that needs it, by the tensor-parallel ranks of
that stage: either whole (``dim`` None) or as one contiguous range along ``dim`` per rank. Megatron fuses
tensors (q, k and v of a query group; gate and up) inside one parameter, but each rank's share of every
single Hugging Face tensor is still one contiguous range, and that is all that loading, weight sync and
export need to know. ``Slot`` names the place inside the fused parameter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ModelDims:
    """The sizes of a Qwen3-style decoder."""

    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    rope_theta: float
    norm_eps: float
    max_positions: int
    architecture: str

    @classmethod
    def from_hf(cls, folder: str | Path) -> ModelDims:
        """Reads ``config.json`` of a Hugging Face folder.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the architecture is not one this trainer knows.
        """
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"model.path: {folder} has no config.json; give a Hugging Face folder")
        return cls.from_dict(json.loads(path.read_text()), source=str(path))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], *, source: str = "config") -> ModelDims:
        """Takes the sizes from a parsed ``config.json``; ``source`` is named in errors."""
        architecture = (raw.get("architectures") or ["?"])[0]
        if architecture not in SUPPORTED_ARCHITECTURES:
            raise ValueError(
                f"{source}: architecture {architecture} is not supported; "
                f"supported: {', '.join(SUPPORTED_ARCHITECTURES)}"
            )
        rope = raw.get("rope_parameters") or {}
        if rope.get("rope_type", "default") != "default" or raw.get("rope_scaling"):
            raise ValueError(f"{source}: scaled rotary embeddings are not supported; use the base model")
        return cls(
            num_layers=raw["num_hidden_layers"],
            hidden_size=raw["hidden_size"],
            ffn_size=raw["intermediate_size"],
            num_heads=raw["num_attention_heads"],
            num_kv_heads=raw["num_key_value_heads"],
            head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
            vocab_size=raw["vocab_size"],
            tie_word_embeddings=raw.get("tie_word_embeddings", False),
            rope_theta=rope.get("rope_theta") or raw.get("rope_theta", 1e6),
            norm_eps=raw.get("rms_norm_eps", 1e-6),
            max_positions=raw.get("max_position_embeddings", 32768),
            architecture=architecture,
        )


SUPPORTED_ARCHITECTURES = ("Qwen3ForCausalLM",)


@dataclass(frozen=True, kw_only=True)
class Slot:
    """A Hugging Face tensor's place on a pipeline stage."""

    name: str
    """Hugging Face name."""
    shape: tuple[int, ...]
    """Full Hugging Face shape."""
    dim: int | None
    """Dimension split over tensor-parallel ranks; None: replicated."""
    stage: int
    """Pipeline stage that owns it (a tied output embedding is also held by the last stage)."""
    module: str
    """Megatron module path on that stage, layer number already local: ``decoder.layers.0.mlp...``."""
    part: str
    """Which part of the module's weight: whole, q, k, v, gate or up."""
    group: str
    """Tensors of one group belong to one fused rollout parameter and travel together."""
    copy_of_embedding: bool = False
    """The tied output weight on the last stage: loaded from the embedding, never exported."""

    def range_of(self, tp_rank: int, tp_size: int) -> tuple[int, int]:
        """Rows [start, stop) along ``dim`` that a tensor-parallel rank owns; the last of a padded
        vocabulary may own fewer, even none."""
        if self.dim is None:
            raise ValueError(f"{self.name} is replicated, not split")
        size = self.shape[self.dim]
        share = -(-size // tp_size)
        return min(tp_rank * share, size), min((tp_rank + 1) * share, size)


def layers_of_stage(num_layers: int, stage: int, pp_size: int) -> range:
    """Decoder layers of a pipeline stage; an even split, which ``validate`` has checked."""
    share = num_layers // pp_size
    return range(stage * share, (stage + 1) * share)


def slots(dims: ModelDims, pp_size: int) -> list[Slot]:
    """Every Hugging Face tensor of the model with its owner, in forward order."""
    hidden, ffn, head = dims.hidden_size, dims.ffn_size, dims.head_dim
    queries, keys = dims.num_heads * head, dims.num_kv_heads * head
    last = pp_size - 1
    table: list[Slot] = []

    def add(
        name: str, shape: tuple[int, ...], dim: int | None, stage: int, module: str, part: str = "whole", **kw: Any
    ) -> None:
        kw.setdefault("group", name)
        table.append(Slot(name=name, shape=shape, dim=dim, stage=stage, module=module, part=part, **kw))

    add("model.embed_tokens.weight", (dims.vocab_size, hidden), 0, 0, "embedding.word_embeddings")
    for stage in range(pp_size):
        for local, layer in enumerate(layers_of_stage(dims.num_layers, stage, pp_size)):
            hf, core = f"model.layers.{layer}", f"decoder.layers.{local}"
            attention, mlp = f"{core}.self_attention", f"{core}.mlp"
            add(f"{hf}.input_layernorm.weight", (hidden,), None, stage, f"{core}.input_layernorm")
            for part, rows in (("q", queries), ("k", keys), ("v", keys)):
                add(
                    f"{hf}.self_attn.{part}_proj.weight",
                    (rows, hidden),
                    0,
                    stage,
                    f"{attention}.linear_qkv",
                    part,
                    group=f"{hf}.self_attn.qkv",
                )
            for part in ("q", "k"):
                add(f"{hf}.self_attn.{part}_norm.weight", (head,), None, stage, f"{attention}.{part}_layernorm")
            add(f"{hf}.self_attn.o_proj.weight", (hidden, queries), 1, stage, f"{attention}.linear_proj")
            add(f"{hf}.post_attention_layernorm.weight", (hidden,), None, stage, f"{core}.pre_mlp_layernorm")
            for part in ("gate", "up"):
                add(
                    f"{hf}.mlp.{part}_proj.weight",
                    (ffn, hidden),
                    0,
                    stage,
                    f"{mlp}.linear_fc1",
                    part,
                    group=f"{hf}.mlp.gate_up",
                )
            add(f"{hf}.mlp.down_proj.weight", (hidden, ffn), 1, stage, f"{mlp}.linear_fc2")
    add("model.norm.weight", (hidden,), None, last, "decoder.final_layernorm")
    if not dims.tie_word_embeddings:
        add("lm_head.weight", (dims.vocab_size, hidden), 0, last, "output_layer")
    elif pp_size > 1:
        embedding = (dims.vocab_size, hidden)
        add("model.embed_tokens.weight", embedding, 0, last, "output_layer", copy_of_embedding=True)
    return table
