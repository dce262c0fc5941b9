"""The sizes of a model. Pure: no torch, no files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SUPPORTED_ARCHITECTURES = (
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
)


@dataclass(frozen=True, kw_only=True)
class VisionShape:
    """Sizes of a Qwen3-VL vision tower."""

    depth: int
    hidden_size: int
    ffn_hidden_size: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    out_hidden_size: int
    num_positions: int
    num_deepstack: int
    """Feature maps that are added to the hidden states after the first decoder layers, one each."""

    @property
    def num_parameters(self) -> int:
        """Weights and biases of patch embedding, position embedding, blocks, merger and deepstack mergers."""
        hidden, ffn = self.hidden_size, self.ffn_hidden_size
        merged = hidden * self.spatial_merge_size**2
        patch = (self.in_channels * self.temporal_patch_size * self.patch_size**2 + 1) * hidden
        block = 4 * hidden * (hidden + 1) + 2 * hidden * ffn + ffn + hidden + 4 * hidden
        merger = merged * (merged + 1) + (merged + 1) * self.out_hidden_size
        mergers = (1 + self.num_deepstack) * merger + 2 * hidden + self.num_deepstack * 2 * merged
        return patch + self.num_positions * hidden + self.depth * block + mergers


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a model, as far as its layout, memory and checkpoints depend on them."""

    architecture: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    """Key/value heads."""
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    max_position_embeddings: int | None = None
    """Longest sequence that the model was made for, in tokens; None: its folder does not say."""
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    vision: VisionShape | None = None
    """The vision tower; None for a text model."""
    mrope_section: tuple[int, int, int] | None = None
    """Rotary frequencies that turn with time, height and width; None for a text model."""
    image_token_id: int | None = None
    video_token_id: int | None = None
    num_experts: int | None = None
    """Experts of every layer's feed-forward part; None: a dense model."""
    num_experts_per_token: int = 0
    expert_ffn_size: int = 0
    """Feed-forward width of one expert."""
    normalize_expert_weights: bool = True
    """The chosen experts' weights add up to 1."""

    @property
    def decoder_prefix(self) -> str:
        """Prefix of the decoder's tensor names in a Hugging Face folder."""
        return "model" if self.vision is None else "model.language_model"

    @property
    def stacks_experts(self) -> bool:
        """Whether a Hugging Face folder holds all experts of a layer in one tensor, transposed (Qwen3-VL)."""
        return self.num_experts is not None and self.vision is not None

    @property
    def layer_parameters(self) -> int:
        """Weights of one decoder layer: q, k, v, o; gate, up, down (of every expert, and the router); two
        norms and the q and k norms."""
        return self._layer_parameters(self.num_experts)

    @property
    def active_layer_parameters(self) -> int:
        """Those of ``layer_parameters`` that one token uses."""
        return self._layer_parameters(self.num_experts and self.num_experts_per_token)

    def _layer_parameters(self, num_experts: int | None) -> int:
        query = self.num_attention_heads * self.head_dim
        key_value = self.num_query_groups * self.head_dim
        attention = self.hidden_size * (2 * query + 2 * key_value)
        if num_experts is None or self.num_experts is None:
            mlp = 3 * self.hidden_size * self.ffn_hidden_size
        else:
            mlp = self.hidden_size * (3 * num_experts * self.expert_ffn_size + self.num_experts)
        return attention + mlp + 2 * self.hidden_size + 2 * self.head_dim

    @property
    def embedding_parameters(self) -> int:
        """Weights of the embedding; the output layer has as many again, unless the two are tied."""
        return self.vocab_size * self.hidden_size

    @property
    def num_parameters(self) -> int:
        """All weights, shared ones counted once, a vision tower included."""
        embeddings = self.embedding_parameters * (1 if self.tie_word_embeddings else 2)
        vision = 0 if self.vision is None else self.vision.num_parameters
        return self.num_layers * self.layer_parameters + embeddings + self.hidden_size + vision


def shape_from_record(record: Mapping[str, Any]) -> ModelShape:
    """The ``ModelShape`` whose fields a mapping holds, as ``dataclasses.asdict`` makes it and JSON keeps it.

    Raises:
        TypeError: the fields are not those of a ``ModelShape``.
    """
    values = dict(record)
    if values.get("vision") is not None:
        values["vision"] = VisionShape(**values["vision"])
    if values.get("mrope_section") is not None:
        values["mrope_section"] = tuple(values["mrope_section"])
    return ModelShape(**values)
