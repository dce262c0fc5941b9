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
class VisionDims:
    """The sizes of a Qwen3-VL vision tower."""

    depth: int
    hidden_size: int
    ffn_size: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    out_hidden_size: int
    num_positions: int
    num_deepstack: int
    """Feature maps that are added to the hidden states after the first decoder layers, one each."""

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> VisionDims:
        return cls(
            depth=raw["depth"],
            hidden_size=raw["hidden_size"],
            ffn_size=raw["intermediate_size"],
            in_channels=raw.get("in_channels", 3),
            patch_size=raw["patch_size"],
            temporal_patch_size=raw["temporal_patch_size"],
            spatial_merge_size=raw["spatial_merge_size"],
            out_hidden_size=raw["out_hidden_size"],
            num_positions=raw["num_position_embeddings"],
            num_deepstack=len(raw["deepstack_visual_indexes"]),
        )


@dataclass(frozen=True, kw_only=True)
class ModelDims:
    """The sizes of a Qwen3-style decoder, and of its vision tower where it has one."""

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
    vision: VisionDims | None = None
    mrope_section: tuple[int, int, int] | None = None
    """Rotary frequencies that turn with time, height and width; None: text only."""
    image_token_id: int | None = None
    video_token_id: int | None = None

    @property
    def decoder_prefix(self) -> str:
        """Of the decoder's tensors in a Hugging Face folder."""
        return "model" if self.vision is None else "model.language_model"

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
        whole = raw
        raw = raw.get("text_config", raw)
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        if rope.get("rope_type", "default") != "default":
            raise ValueError(f"{source}: scaled rotary embeddings are not supported; use the base model")
        section = rope.get("mrope_section")
        vision = whole.get("vision_config")
        return cls(
            vision=None if vision is None else VisionDims.from_dict(vision),
            mrope_section=None if vision is None else tuple(section or (24, 20, 20)),
            image_token_id=whole.get("image_token_id"),
            video_token_id=whole.get("video_token_id"),
            num_layers=raw["num_hidden_layers"],
            hidden_size=raw["hidden_size"],
            ffn_size=raw["intermediate_size"],
            num_heads=raw["num_attention_heads"],
            num_kv_heads=raw["num_key_value_heads"],
            head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
            vocab_size=raw["vocab_size"],
            tie_word_embeddings=whole.get("tie_word_embeddings", raw.get("tie_word_embeddings", False)),
            rope_theta=rope.get("rope_theta") or raw.get("rope_theta", 1e6),
            norm_eps=raw.get("rms_norm_eps", 1e-6),
            max_positions=raw.get("max_position_embeddings", 32768),
            architecture=architecture,
        )


SUPPORTED_ARCHITECTURES = ("Qwen3ForCausalLM", "Qwen3VLForConditionalGeneration")


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
    """Which part of the module's weight: whole, q, k, v, gate or up; ``parameter``: ``module`` names the
    parameter itself."""
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
        name: str,
        shape: tuple[int, ...],
        dim: int | None,
        stage: int,
        module: str,
        part: str = "whole",
        **kw: Any,
    ) -> None:
        kw.setdefault("group", name)
        table.append(Slot(name=name, shape=shape, dim=dim, stage=stage, module=module, part=part, **kw))

    if dims.vision is not None:
        for name, shape in vision_tensors(dims.vision).items():
            add(f"model.visual.{name}", shape, None, 0, f"visual.{name}", "parameter")
    decoder = dims.decoder_prefix
    add(f"{decoder}.embed_tokens.weight", (dims.vocab_size, hidden), 0, 0, "embedding.word_embeddings")
    for stage in range(pp_size):
        for local, layer in enumerate(layers_of_stage(dims.num_layers, stage, pp_size)):
            hf, core = f"{decoder}.layers.{layer}", f"decoder.layers.{local}"
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
                add(
                    f"{hf}.self_attn.{part}_norm.weight",
                    (head,),
                    None,
                    stage,
                    f"{attention}.{part}_layernorm",
                )
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
    add(f"{decoder}.norm.weight", (hidden,), None, last, "decoder.final_layernorm")
    if not dims.tie_word_embeddings:
        add("lm_head.weight", (dims.vocab_size, hidden), 0, last, "output_layer")
    elif pp_size > 1:
        embedding = (dims.vocab_size, hidden)
        add(f"{decoder}.embed_tokens.weight", embedding, 0, last, "output_layer", copy_of_embedding=True)
    return table


def vision_tensors(vision: VisionDims) -> dict[str, tuple[int, ...]]:
    """Names (below ``model.visual.``) and shapes of the vision tower's tensors, in forward order."""
    hidden, ffn = vision.hidden_size, vision.ffn_size
    merged = hidden * vision.spatial_merge_size**2
    patch = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    table: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (hidden, *patch),
        "patch_embed.proj.bias": (hidden,),
        "pos_embed.weight": (vision.num_positions, hidden),
    }

    def linear(name: str, rows: int, columns: int) -> None:
        table[f"{name}.weight"], table[f"{name}.bias"] = (rows, columns), (rows,)

    def norm(name: str, size: int) -> None:
        table[f"{name}.weight"], table[f"{name}.bias"] = (size,), (size,)

    for layer in range(vision.depth):
        block = f"blocks.{layer}"
        norm(f"{block}.norm1", hidden)
        norm(f"{block}.norm2", hidden)
        linear(f"{block}.attn.qkv", 3 * hidden, hidden)
        linear(f"{block}.attn.proj", hidden, hidden)
        linear(f"{block}.mlp.linear_fc1", ffn, hidden)
        linear(f"{block}.mlp.linear_fc2", hidden, ffn)
    mergers = ["merger"] + [f"deepstack_merger_list.{i}" for i in range(vision.num_deepstack)]
    for name in mergers:
        norm(f"{name}.norm", hidden if name == "merger" else merged)
        linear(f"{name}.linear_fc1", merged, merged)
        linear(f"{name}.linear_fc2", vision.out_hidden_size, merged)
    return table
