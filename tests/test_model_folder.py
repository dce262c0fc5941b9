"""What a run reads before it starts: the model's folder, the dry run, and the configurations shipped."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from copd_megatron.config import ConfigError, load_config, read_model_shape, read_model_shapes
from copd_megatron.launch import dry_run as dry_run_module
from copd_megatron.launch.dry_run import dry_run
from copd_megatron.planner.memory import estimate_memory
from tests.support.commands import ROOT
from tests.support.run_config import load
from tests.support.shapes import HF_CONFIG, MIXTURE, SHAPE, write_model

# --- the model's folder ------------------------------------------------------------------------------------


def test_the_model_shape_is_read_from_config_json(tmp_path: Path) -> None:
    assert read_model_shape(write_model(tmp_path / "base")) == SHAPE


def test_sharded_weights_are_found_through_their_index(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "base")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"1 weight file\(s\).*model-00002-of-00002"):
        read_model_shape(folder)
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"")
    assert read_model_shape(folder) == SHAPE


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer"),
        (lambda folder: write_model(folder, architectures=["LlamaForCausalLM"]), "Llama.*Qwen3For"),
        (lambda folder: write_model(folder, architectures=None), "none named"),
        (lambda folder: write_model(folder, hidden_size="64"), "hidden_size is '64'"),
    ],
)
def test_a_broken_model_folder_says_what_is_wrong(tmp_path: Path, damage: Any, message: str) -> None:
    folder = write_model(tmp_path / "base")
    damage(folder)
    with pytest.raises(ConfigError, match=message) as error:
        read_model_shape(folder, "model.path")
    assert str(error.value).startswith("model.path: ")


def test_a_missing_model_folder_names_the_setting(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    gone = tmp_path / "gone"
    with pytest.raises(ConfigError, match=r"^model\.path: .*gone: no such folder"):
        read_model_shapes(load(tmp_path, f"model.path={gone}"))
    with pytest.raises(ConfigError, match=r"^branches\.image\.model_path: .*gone: no such folder"):
        read_model_shapes(load(tmp_path, f"model.path={base}", f"branches.image.model_path={gone}"))


def test_the_parameter_count_is_that_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    for tied in (True, False):
        hf_config = transformers.Qwen3Config(**(HF_CONFIG | {"tie_word_embeddings": tied}))
        with torch.device("meta"):
            model = transformers.Qwen3ForCausalLM(hf_config)
        expected = sum(parameter.numel() for parameter in model.parameters())
        assert replace(SHAPE, tie_word_embeddings=tied).num_parameters == expected


def test_the_parameter_count_holds_the_vision_tower(tmp_path: Path) -> None:
    from transformers import Qwen3VLForConditionalGeneration

    from copd_megatron.tiny.vl import build_processor, build_visual_model
    from copd_megatron.tiny.vl_recipe import VL_BASE

    model = build_visual_model(VL_BASE, build_processor(VL_BASE))
    assert isinstance(model, Qwen3VLForConditionalGeneration)
    model.save_pretrained(tmp_path)
    build_processor(VL_BASE).save_pretrained(tmp_path)
    expected = sum(parameter.numel() for parameter in model.parameters())
    assert read_model_shape(tmp_path).num_parameters == expected


def test_a_mixture_of_experts_is_read_from_config_json(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "base")
    settings = json.loads((folder / "config.json").read_text())
    settings |= {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    assert read_model_shape(folder) == MIXTURE
    assert MIXTURE.layer_parameters - MIXTURE.active_layer_parameters == 4 * 3 * 64 * 32
    (folder / "config.json").write_text(json.dumps(settings | {"mlp_only_layers": [0]}))
    with pytest.raises(ConfigError, match="mlp_only_layers"):
        read_model_shape(folder)


# --- dry run -----------------------------------------------------------------------------------------------


def test_the_dry_run_shows_config_layout_edges_and_memory(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    config = load(tmp_path, f"model.path={base}", "run.device=cpu", "schedule.cycles=3")
    text = dry_run(config, 6, {"text": 500})
    assert "num_prompts_per_step: 16" in text
    assert "text: ranks 0..1 (2), tp 2" in text
    assert "image: ranks 2..5 (4), tp 2" in text
    assert "image<-text" in text
    assert "text<-image" in text
    assert "CPU, float32" in text
    assert f"{SHAPE.num_parameters:,} parameters" in text
    assert "\nschedule.cycles: 3  (default 4)\n" in text and f"\nmodel.path: {base}\n" in text
    assert "\nschedule.rlvr_steps:" not in text, "it has its default"
    assert "75 steps: 3 cycles of 15 steps of Phase I and 10 of Phase II" in text
    prompts = config.branches["text"].num_prompts_per_step
    assert f"500 training samples, {75 * prompts / 500:.3g} epochs" in text
    assert "a crash loses the run (checkpoint.save_period=0)" in text


def test_the_dry_run_says_whether_a_branch_fits_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_model(tmp_path / "base")
    config = load(tmp_path, f"model.path={base}", "run.device=cuda")
    for size, verdict in (
        (80 << 30, "  fits (this machine's GPUs have 80.00 GiB)"),
        (1 << 20, "DOES NOT FIT"),
    ):
        monkeypatch.setattr(dry_run_module, "_gpu_bytes", lambda size=size: size)
        assert verdict in dry_run(config, 6)
    monkeypatch.setattr(dry_run_module, "_gpu_bytes", lambda: None)
    assert "this machine's GPUs" not in dry_run(config, 6)


def test_the_dry_run_refuses_what_a_start_would(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    with pytest.raises(ConfigError, match="--nproc-per-node=6"):
        dry_run(load(tmp_path, f"model.path={base}"), 4)


QWEN3_VL_4B = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "model_type": "qwen3_vl",
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "tie_word_embeddings": True,
    "text_config": {
        "model_type": "qwen3_vl_text",
        "vocab_size": 151936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5000000,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        "tie_word_embeddings": True,
    },
    "vision_config": {
        "model_type": "qwen3_vl",
        "depth": 24,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_heads": 16,
        "in_channels": 3,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 2560,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [5, 11, 17],
    },
}
"""config.json of Qwen3-VL-4B-Instruct."""


QWEN3_VL_30B_A3B: dict[str, Any] = {
    **QWEN3_VL_4B,
    "architectures": ["Qwen3VLMoeForConditionalGeneration"],
    "model_type": "qwen3_vl_moe",
    "tie_word_embeddings": False,
    "text_config": {
        **QWEN3_VL_4B["text_config"],
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "tie_word_embeddings": False,
    },
    "vision_config": {
        **QWEN3_VL_4B["vision_config"],
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "out_hidden_size": 2048,
        "deepstack_visual_indexes": [8, 16, 24],
    },
}
"""config.json of Qwen3-VL-30B-A3B-Instruct."""

SPOKES = {"text<-image", "text<-video", "image<-text", "video<-text"}


@pytest.mark.parametrize(
    ("name", "model", "ranks", "parameters", "edges"),
    [
        ("two_branch_qwen3_vl_4b", QWEN3_VL_4B, 8, 4.4e9, {"text<-image", "image<-text"}),
        ("three_branch_qwen3_vl_4b", QWEN3_VL_4B, 8, 4.4e9, SPOKES),
        ("three_branch_qwen3_vl_30b_a3b", QWEN3_VL_30B_A3B, 16, 31.1e9, SPOKES),
    ],
)
def test_the_large_configs_hold_the_papers_values_and_fit_80_gb(
    name: str, model: dict[str, Any], ranks: int, parameters: float, edges: set[str], tmp_path: Path
) -> None:
    """``parameters``: as published, the vision tower included; ``ranks``: of a branch."""
    base = write_model(tmp_path / "base")
    (base / "config.json").write_text(json.dumps(model))
    config = load_config(ROOT / "configs" / f"{name}.yaml", [f"model.path={base}"])
    branches = ["text", "image", "video"][: len(config.branches)]
    world_size = ranks * len(branches)
    text = dry_run(config, world_size)
    assert list(config.branches) == branches
    assert set(re.findall(r"\w+<-\w+", text)) - {"student<-teacher"} == edges
    assert config.optimizer.lr == 1e-6
    assert config.schedule.rlvr_steps == 1.5 * config.schedule.opd_steps
    assert (config.loss.ratio_clip_min, config.loss.ratio_clip_max) == (0.2, 0.28)
    assert config.opd.behaviour.top_k == 10
    for branch in config.branches.values():
        assert (branch.num_prompts_per_step, branch.num_generations_per_prompt) == (256, 8)
        assert (branch.data.max_prompt_tokens, branch.rollout.max_new_tokens) == (16384, 16384)
        assert branch.rollout.temperature == 1.0
    shapes = read_model_shapes(config)
    for branch_name, branch in config.branches.items():
        assert shapes[branch_name].num_parameters == pytest.approx(parameters, rel=0.02)
        estimate = estimate_memory(config, branch, shapes[branch_name], on_gpu=True)
        # vLLM's share of an 80 GB GPU, where it is more than its weights
        sampling = estimate.sampling - estimate.rollout + branch.rollout.gpu_memory_utilization * 80e9
        assert max(estimate.training, sampling) < 72e9


def test_a_checkpoint_as_a_model_is_refused_with_the_command_that_converts_it(tmp_path: Path) -> None:
    folder = tmp_path / "step_000100" / "text"
    folder.mkdir(parents=True)
    (folder / ".metadata").write_bytes(b"")
    with pytest.raises(ConfigError, match=f"copd checkpoint to-hf {folder} text_hf, and name that"):
        read_model_shape(folder, "branches.text.model_path")
