"""A folder whose config.json describes another function than the actor computes is refused at the start."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from copd_megatron.config import ConfigError, read_model_shape
from copd_megatron.hf.model_config import read_sizes
from copd_megatron.hf.model_function import CHECKED, HARMLESS, check_function
from copd_megatron.model.shape import SUPPORTED_ARCHITECTURES
from tests.support.shapes import HF_CONFIG, write_model
from tests.test_model_folder import QWEN3_VL_4B, QWEN3_VL_30B_A3B

TEXT = HF_CONFIG
MIXTURE = TEXT | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
MODELS: dict[str, dict[str, Any]] = {
    "text": TEXT,
    "mixture": MIXTURE,
    "vl": QWEN3_VL_4B,
    "vl_mixture": QWEN3_VL_30B_A3B,
}
REMOVED = object()

READ_AS_SIZES = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps"),
    *(
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "decoder_sparse_step",
        "mlp_only_layers",
    ),
}


def changed(model: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy with one setting, dotted, set or removed."""
    result = copy.deepcopy(model)
    *path, leaf = key.split(".")
    place = result
    for part in path:
        place = place[part]
    place.pop(leaf, None)
    if value is not REMOVED:
        place[leaf] = value
    return result


def check(model: dict[str, Any]) -> None:
    check_function(model, model["architectures"][0], "model.path: base")


@pytest.mark.parametrize("name", MODELS)
def test_models_as_published_are_taken(name: str) -> None:
    check(MODELS[name])
    published = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": 36,
        "use_cache": True,
        "layer_types": ["full_attention"] * 4,
    }
    text = "text_config." if "text_config" in MODELS[name] else ""
    model = MODELS[name]
    for key, value in published.items():
        model = changed(model, text + key, value)
    check(changed(model, "transformers_version", "5.12.1"))


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("text", "attention_bias", True, "attention_bias is True, but the attention has no biases"),
        ("text", "hidden_act", "gelu", "hidden_act is 'gelu', but the feed-forward layers use silu"),
        ("text", "use_sliding_window", True, "use_sliding_window is True"),
        ("text", "layer_types", ["full_attention", "sliding_attention"], "layer_types is"),
        ("text", "is_causal", False, "is_causal is False, but the attention is causal"),
        ("text", "dual_chunk_attention_config", {"chunk_size": 8}, "sees the whole context"),
        ("text", "partial_rotary_factor", 0.5, "partial_rotary_factor is 0.5, but the whole head"),
        ("text", "rope_scaling", {"type": "yarn", "factor": 4.0}, "rope_scaling asks for rope_type 'yarn'"),
        ("text", "rope_scaling", {"rope_type": "linear", "factor": 2.0}, "rope_type 'linear'"),
        ("text", "rope_scaling", {"factor": 4.0}, "rope_scaling.factor is 4.0"),
        ("text", "rope_scaling", {"mrope_section": [2, 3, 3]}, "rope_scaling.mrope_section"),
        ("text", "rope_parameters", {"rope_type": "yarn", "rope_theta": 1e6}, "rope_type 'yarn'"),
        (
            "text",
            "rope_parameters",
            {"full_attention": {"rope_type": "default", "rope_theta": 1e6}},
            "rope_parameters.full_attention",
        ),
        ("text", "rope_theta", REMOVED, "rope_theta is missing, and libraries would take"),
        ("text", "rope_theta", 10000.5, "rope_theta is 10000.5"),
        ("text", "num_key_value_heads", REMOVED, "num_key_value_heads is missing"),
        ("text", "quantization_config", {"quant_method": "fp8"}, "quantization_config is"),
        ("text", "compression_config", {"format": "pack"}, "compression_config is"),
        ("text", "model_type", "qwen3_moe", "model_type is 'qwen3_moe', but Qwen3ForCausalLM has 'qwen3'"),
        ("text", "model_type", REMOVED, "model_type is missing"),
        ("text", "vision_config", {"depth": 2}, "is a text model"),
        ("mixture", "head_dim", REMOVED, "head_dim is missing"),
        ("mixture", "shared_expert_intermediate_size", 64, "no expert is shared"),
        ("mixture", "attention_bias", True, "the attention has no biases"),
        ("vl", "text_config.attention_bias", True, "text_config.attention_bias is True"),
        ("vl", "text_config.sliding_window", 4096, "text_config.sliding_window is 4096"),
        ("vl", "text_config.rope_theta", REMOVED, "text_config.rope_theta is missing"),
        ("vl", "text_config.rope_scaling.mrope_interleaved", REMOVED, "mrope_interleaved is missing"),
        ("vl", "text_config.rope_scaling.mrope_section", [16, 24, 25], "half of head_dim 128"),
        ("vl", "text_config.rope_scaling.mrope_section", REMOVED, "mrope_section is missing"),
        ("vl", "text_config.rope_scaling.type", "mrope", None),
        ("vl", "quantization_config", {"quant_method": "fp8"}, "quantization_config is"),
        ("vl", "text_config.quantization_config", {"bits": 4}, "text_config.quantization_config is"),
        ("vl", "text_config", REMOVED, "text_config is missing"),
        ("vl", "vision_config", [], "vision_config is []"),
        ("vl", "image_token_id", REMOVED, "image_token_id is missing"),
        ("vl", "vision_config.deepstack_visual_indexes", REMOVED, "deepstack_visual_indexes is missing"),
        ("vl", "tie_word_embeddings", False, "tie_word_embeddings is False, but text_config"),
        ("vl", "tie_word_embeddings", REMOVED, "tie_word_embeddings is missing, but text_config"),
        ("vl_mixture", "text_config.norm_topk_prob", False, "norm_topk_prob is False"),
        ("vl_mixture", "text_config.norm_topk_prob", REMOVED, "norm_topk_prob is missing"),
    ],
)
def test_another_function_is_refused(name: str, key: str, value: Any, message: str | None) -> None:
    model = changed(MODELS[name], key, value)
    if message is None:
        check(model)
        return
    with pytest.raises(ConfigError) as error:
        check(model)
    assert message in str(error.value)
    assert str(error.value).startswith("model.path: base: config.json: ")


def test_all_that_differs_is_told_at_once() -> None:
    model = changed(changed(TEXT, "attention_bias", True), "rope_theta", REMOVED)
    with pytest.raises(ConfigError, match=r"no biases; rope_theta is missing"):
        check(model)


def test_a_folder_that_cannot_be_trained_has_sizes_all_the_same(tmp_path: Path) -> None:
    """Merges and conversions move weights and compute nothing."""
    folder = write_model(tmp_path / "base", rope_scaling={"type": "yarn", "factor": 4.0})
    assert read_sizes(folder).num_layers == 4
    with pytest.raises(ConfigError, match="'yarn'"):
        read_model_shape(folder)


@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta"])
def test_numbers_that_are_none_are_named(key: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "base", **{key: "1e-6"})
    with pytest.raises(ConfigError, match=rf"config\.json: {key} is '1e-6'"):
        read_sizes(folder)
    (folder / "config.json").write_text(json.dumps(HF_CONFIG | {key: float("inf")}))
    with pytest.raises(ConfigError, match=r"config\.json.*not valid JSON \(Infinity"):
        read_model_shape(folder)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": 5}, "architectures is 5"),
        ({"architectures": "Qwen3ForCausalLM"}, "architectures is 'Qwen3ForCausalLM', expected a list"),
        ({"architectures": [["Qwen3ForCausalLM"]]}, "architectures is"),
        ({"text_config": "x"}, "text_config is 'x'"),
        ({"vision_config": [1]}, r"vision_config is \[1\]"),
        ({"rope_parameters": [1]}, r"rope_parameters is \[1\]"),
        ({"rope_scaling": "default"}, "rope_scaling is 'default'"),
        ({"rope_theta": 10**400}, "too large"),
        ({"rms_norm_eps": 10**90}, "rms_norm_eps"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, no model has"),
        ({"vocab_size": 10**18}, "vocab_size"),
        (
            {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 10**9, "num_experts_per_tok": 2,
             "moe_intermediate_size": 32, "model_type": "qwen3_moe"},
            "experts together",
        ),
    ],
)  # fmt: skip
def test_odd_values_are_named_and_sizes_have_bounds(
    changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    """Whoever enumerates the tensors of 10^9 layers never ends."""
    folder = write_model(tmp_path / "base", **changes)
    for read in (read_sizes, read_model_shape):
        with pytest.raises(ConfigError, match=rf"config\.json.*{named}"):
            read(folder)


def test_a_list_of_lists_of_layer_types_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="layer_types"):
        read_model_shape(write_model(tmp_path / "base", layer_types=[[1]]))


def test_every_setting_that_transformers_reads_is_thought_about() -> None:
    """A new version that reads more settings fails here, before it computes something else in silence."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    known = READ_AS_SIZES | CHECKED | HARMLESS
    assert not (CHECKED & HARMLESS or READ_AS_SIZES & (CHECKED | HARMLESS))
    for model in MODELS.values():
        classes = [CONFIG_MAPPING[model["model_type"]]]
        if "text_config" in model:
            classes.append(classes[0].sub_configs["text_config"])
        for config_class in classes:
            own = set(config_class.__annotations__) - {"base_config_key", "default_theta"}
            assert len(own) > 3, config_class
            assert own <= known, (config_class.__name__, own - known)


def test_the_models_of_this_test_are_all_that_is_supported() -> None:
    assert {model["architectures"][0] for model in MODELS.values()} == set(SUPPORTED_ARCHITECTURES)
