"""Which function a config.json describes, against the one that the actor computes.

The actor computes Qwen3 as published: causal attention over the whole context without biases, unscaled rotary
embeddings over the whole head, SiLU. transformers and vLLM read more settings than that. A model whose
config.json asks for something else would be trained as another function than it was made with, and than vLLM
samples from; a frozen teacher has no vLLM beside it, so nothing would notice. Such a folder is refused.

Settings that are absent are refused, too, where libraries fill them in differently. ``HARMLESS`` lists those
that transformers reads and that change nothing here; a test holds the three groups together against the
installed transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from copd_megatron.errors import ConfigError

MODEL_TYPES: Final = {
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Qwen3VLForConditionalGeneration": "qwen3_vl",
    "Qwen3VLMoeForConditionalGeneration": "qwen3_vl_moe",
}

HARMLESS: Final = frozenset(
    {
        *("initializer_range", "use_cache", "output_router_logits", "router_aux_loss_coef"),
        *("pad_token_id", "bos_token_id", "eos_token_id", "vision_start_token_id", "vision_end_token_id"),
        # transformers applies it in training only; reinforcement learning goes without dropout
        "attention_dropout",
        # read with use_sliding_window only, which is refused
        *("sliding_window", "max_window_layers"),
    }
)
"""Settings that do not change what the model computes."""


@dataclass(frozen=True, kw_only=True)
class _Rule:
    """Values of one setting with which the model is the one that the actor computes."""

    key: str
    holds: Callable[[Any], bool]
    wanted: str
    """What the actor computes, to be read after "but"."""


def _only(*values: Any) -> Callable[[Any], bool]:
    return lambda value: value in values and isinstance(value, bool) == isinstance(values[0], bool)


def _all_full_attention(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(kind == "full_attention" for kind in value))


_DECODER: Final = (
    _Rule(key="hidden_act", holds=_only("silu"), wanted="the feed-forward layers use silu"),
    _Rule(key="attention_bias", holds=_only(False), wanted="the attention has no biases"),
    _Rule(key="use_sliding_window", holds=_only(False), wanted="the attention sees the whole context"),
    _Rule(key="layer_types", holds=_all_full_attention, wanted="every layer's attention is full_attention"),
    _Rule(key="is_causal", holds=_only(True), wanted="the attention is causal"),
    _Rule(
        key="dual_chunk_attention_config", holds=_only(None), wanted="the attention sees the whole context"
    ),
    _Rule(key="partial_rotary_factor", holds=_only(1, 1.0, None), wanted="the whole head is rotated"),
    _Rule(key="shared_expert_intermediate_size", holds=_only(0, None), wanted="no expert is shared"),
    _Rule(key="quantization_config", holds=_only(None, {}), wanted="weights are read as they are, unscaled"),
    _Rule(key="compression_config", holds=_only(None, {}), wanted="weights are read as they are, unscaled"),
)
_SLIDING_WINDOW = _Rule(
    key="sliding_window", holds=_only(None, 0), wanted="the attention sees the whole context"
)
_ROPE_KEYS: Final = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
_MROPE_KEYS: Final = frozenset({"mrope_section", "mrope_interleaved"})

CHECKED: Final = frozenset(
    {
        *(rule.key for rule in _DECODER),
        *("rope_parameters", "rope_scaling", "rope_theta", "norm_topk_prob", "tie_word_embeddings"),
        *("text_config", "vision_config", "image_token_id", "video_token_id"),
    }
)
"""Settings that this file looks at."""


def check_function(config: Mapping[str, Any], architecture: str, where: str) -> None:
    """Whether the actor computes the function that a config.json describes.

    Args:
        config: content of config.json.
        architecture: the supported one that it names.
        where: the folder and the setting that named it, for the message.

    Raises:
        ConfigError: with every setting that asks for something else, or that is missing and has no agreed
            default.
    """
    problems = list(_problems(config, architecture))
    if problems:
        listed = "; ".join(problems)
        raise ConfigError(
            f"{where}: config.json: {listed}. The actor computes {architecture} as published; use a model "
            "of that kind, or correct config.json where it does not describe the model"
        )


def _problems(config: Mapping[str, Any], architecture: str) -> Iterator[str]:
    wanted = MODEL_TYPES[architecture]
    if config.get("model_type") != wanted:
        yield f"model_type is {_shown(config, 'model_type')}, but {architecture} has {wanted!r}"
    visual, mixture = "VL" in architecture, "Moe" in architecture
    if visual:
        yield from _visual(config)
    elif "vision_config" in config or "text_config" in config:
        yield f"{architecture} is a text model, but there is a vision_config or text_config"
    if visual and not isinstance(config.get("text_config"), Mapping):
        return
    prefix = "text_config." if visual else ""
    text = config["text_config"] if visual else config
    for rule in (*_DECODER, *([_SLIDING_WINDOW] if visual else [])):
        for place, key in ((text, prefix + rule.key), *([(config, rule.key)] if visual else [])):
            if rule.key in place and not rule.holds(place[rule.key]):
                yield f"{key} is {place[rule.key]!r}, but {rule.wanted}"
    yield from _rotary(text, prefix, visual=visual)
    yield from _missing(text, prefix, mixture=mixture)
    if visual and mixture and text.get("norm_topk_prob") is not True:
        yield (
            f"{prefix}norm_topk_prob is {_shown(text, 'norm_topk_prob')}, but Qwen3-VL always normalises the "
            "weights of the chosen experts and vLLM wants to be told: it has to be true"
        )


def _visual(config: Mapping[str, Any]) -> Iterator[str]:
    """What only a vision-language model has."""
    for section in ("text_config", "vision_config"):
        if not isinstance(config.get(section), Mapping):
            yield f"{section} is {_shown(config, section)}, and libraries would make one up"
    for key in ("image_token_id", "video_token_id"):
        if not isinstance(config.get(key), int):
            yield f"{key} is {_shown(config, key)}, and must be the id of the placeholder token"
    vision, text = config.get("vision_config"), config.get("text_config")
    if isinstance(vision, Mapping) and "deepstack_visual_indexes" not in vision:
        yield "vision_config.deepstack_visual_indexes is missing, and libraries would make some up"
    inner = text.get("tie_word_embeddings") if isinstance(text, Mapping) else None
    if inner is not None and inner != config.get("tie_word_embeddings", False):
        yield (
            f"tie_word_embeddings is {_shown(config, 'tie_word_embeddings')}, but "
            f"text_config.tie_word_embeddings {inner!r}: libraries differ in which they read"
        )


def _rotary(text: Mapping[str, Any], prefix: str, *, visual: bool) -> Iterator[str]:
    """Unscaled rotary embeddings whose base is given."""
    new, old = text.get("rope_parameters"), text.get("rope_scaling")
    if new and old and new != old:
        yield f"{prefix}rope_parameters and {prefix}rope_scaling differ, and libraries read one or the other"
    rope = new or old or {}
    name = prefix + ("rope_parameters" if new else "rope_scaling")
    if not isinstance(rope, Mapping):
        yield f"{name} is {rope!r}, expected a mapping"
        return
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        yield f"{name} asks for rope_type {kind!r}, but rotary embeddings are not scaled"
    elif unknown := sorted(set(rope) - _ROPE_KEYS - (_MROPE_KEYS if visual else frozenset())):
        yield f"{name}.{unknown[0]} is {rope[unknown[0]]!r}, but rotary embeddings know no such setting"
    if rope.get("partial_rotary_factor", 1) != 1:
        share = rope["partial_rotary_factor"]
        yield f"{name}.partial_rotary_factor is {share!r}, but the whole head is rotated"
    theta = rope.get("rope_theta", text.get("rope_theta"))
    if not isinstance(theta, int | float) or not 1 <= theta < 1e30 or theta % 1:
        yield (
            f"{prefix}rope_theta is {'missing' if theta is None else repr(theta)}, and libraries would take "
            "10,000 or 500,000: it must be a whole number, the one that the model was trained with"
        )
    if visual:
        yield from _multimodal_rotary(rope, name, text.get("head_dim", 128))


def _multimodal_rotary(rope: Mapping[str, Any], name: str, head_dim: Any) -> Iterator[str]:
    if rope.get("mrope_interleaved") is not True:
        yield (
            f"{name}.mrope_interleaved is {_shown(rope, 'mrope_interleaved')}, but Qwen3-VL interleaves "
            "time, height and width, and vLLM wants to be told: it has to be true"
        )
    section = rope.get("mrope_section")
    sizes = section if isinstance(section, list) and all(isinstance(size, int) for size in section) else []
    if len(sizes) != 3 or not isinstance(head_dim, int) or 2 * sum(sizes) != head_dim:
        yield (
            f"{name}.mrope_section is {_shown(rope, 'mrope_section')}, and must be three numbers that add up "
            f"to half of head_dim {head_dim!r}"
        )


def _missing(text: Mapping[str, Any], prefix: str, *, mixture: bool) -> Iterator[str]:
    """Sizes for which libraries have defaults of their own."""
    for key in ("num_key_value_heads", *(["head_dim"] if mixture else [])):
        if text.get(key) is None:
            yield f"{prefix}{key} is missing, and libraries fill it in differently: write it down"


def _shown(place: Mapping[str, Any], key: str) -> str:
    return repr(place[key]) if key in place else "missing"
