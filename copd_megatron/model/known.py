"""Sizes of published models by name, for plans that need no weights on disk. Pure."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import PurePath
from typing import Any, Final

from copd_megatron.model.shape import ModelShape, VisionShape

_VOCABULARY: Final = 151936
_SUFFIX = re.compile(r"-(instruct|thinking|base|\d{4}|fp8)$")


def _dense(layers: int, hidden: int, ffn: int, heads: int, *, tied: bool) -> ModelShape:
    return ModelShape(
        architecture="Qwen3ForCausalLM",
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=8,
        head_dim=128,
        vocab_size=_VOCABULARY,
        tie_word_embeddings=tied,
        max_position_embeddings=40960,
    )


def _mixture(layers: int, hidden: int, ffn: int, heads: int, expert: int) -> ModelShape:
    return replace(
        _dense(layers, hidden, ffn, heads, tied=False),
        architecture="Qwen3MoeForCausalLM",
        num_query_groups=4,
        num_experts=128,
        num_experts_per_token=8,
        expert_ffn_size=expert,
    )


def _with_vision(text: ModelShape, *, large_tower: bool) -> ModelShape:
    depth, hidden, ffn = (27, 1152, 4304) if large_tower else (24, 1024, 4096)
    tower: dict[str, Any] = {"depth": depth, "hidden_size": hidden, "ffn_hidden_size": ffn}
    kind = "Qwen3VLMoe" if text.num_experts else "Qwen3VL"
    return replace(
        text,
        architecture=f"{kind}ForConditionalGeneration",
        max_position_embeddings=262144,
        rope_theta=5e6,
        mrope_section=(24, 20, 20),
        image_token_id=151655,
        video_token_id=151656,
        vision=VisionShape(
            **tower,
            in_channels=3,
            patch_size=16,
            temporal_patch_size=2,
            spatial_merge_size=2,
            out_hidden_size=text.hidden_size,
            num_positions=2304,
            num_deepstack=3,
        ),
    )


_TEXT: Final = {
    "qwen3-0.6b": _dense(28, 1024, 3072, 16, tied=True),
    "qwen3-1.7b": _dense(28, 2048, 6144, 16, tied=True),
    "qwen3-4b": _dense(36, 2560, 9728, 32, tied=True),
    "qwen3-8b": _dense(36, 4096, 12288, 32, tied=False),
    "qwen3-14b": _dense(40, 5120, 17408, 40, tied=False),
    "qwen3-32b": _dense(64, 5120, 25600, 64, tied=False),
    "qwen3-30b-a3b": _mixture(48, 2048, 6144, 32, 768),
    "qwen3-235b-a22b": _mixture(94, 4096, 12288, 64, 1536),
}
KNOWN: Final = _TEXT | {
    "qwen3-vl-2b": _with_vision(_TEXT["qwen3-1.7b"], large_tower=False),
    "qwen3-vl-4b": _with_vision(_TEXT["qwen3-4b"], large_tower=False),
    "qwen3-vl-8b": _with_vision(_TEXT["qwen3-8b"], large_tower=True),
    "qwen3-vl-32b": _with_vision(_TEXT["qwen3-32b"], large_tower=True),
    "qwen3-vl-30b-a3b": _with_vision(_TEXT["qwen3-30b-a3b"], large_tower=True),
    "qwen3-vl-235b-a22b": _with_vision(_TEXT["qwen3-235b-a22b"], large_tower=True),
}
"""Name in lower case, without ``-Instruct`` and the like, to sizes."""


def known_shape(path: str) -> ModelShape | None:
    """The sizes of the model that the last part of ``path`` names; None: not among them."""
    name = PurePath(path).name.lower()
    while (shorter := _SUFFIX.sub("", name)) != name:
        name = shorter
    return KNOWN.get(name)
