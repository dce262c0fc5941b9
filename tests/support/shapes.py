"""Shapes of small models, and folders that hold no weights: for what is computed before a start."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from copd_megatron.model.shape import ModelShape, VisionShape

SHAPE = ModelShape(
    architecture="Qwen3ForCausalLM",
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=192,
    num_attention_heads=8,
    num_query_groups=4,
    head_dim=16,
    vocab_size=260,
    tie_word_embeddings=True,
)
MIXTURE = replace(
    SHAPE, architecture="Qwen3MoeForCausalLM", num_experts=6, num_experts_per_token=2, expert_ffn_size=32
)
TOWER = VisionShape(
    depth=2,
    hidden_size=32,
    ffn_hidden_size=64,
    in_channels=3,
    patch_size=8,
    temporal_patch_size=2,
    spatial_merge_size=2,
    out_hidden_size=64,
    num_positions=64,
    num_deepstack=1,
)

HF_CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": 260,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
"""``SHAPE`` as a folder's config.json says it."""


def write_model(folder: Path, **changes: Any) -> Path:
    """Writes a folder of ``SHAPE`` with empty weights; ``changes`` are fields of its config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(HF_CONFIG | changes))
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "tokenizer.json").write_text("{}")
    return folder
