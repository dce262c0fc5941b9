"""Small Hugging Face folders for merging: a Qwen3's tensors, random, without building the model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from copd_megatron.checkpoint.manifest import BranchEntry, FileEntry, Manifest, hash_file, write_manifest
from copd_megatron.hf.model_config import read_sizes
from tests.support.byte_tokenizer import save_tokenizer

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 258,
    "tie_word_embeddings": False,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "eos_token_id": 256,
}


def shapes_of(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Qwen3."""
    hidden, ffn, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "self_attn.q_proj.weight": (queries, hidden),
            prefix + "self_attn.k_proj.weight": (keys, hidden),
            prefix + "self_attn.v_proj.weight": (keys, hidden),
            prefix + "self_attn.o_proj.weight": (hidden, queries),
            prefix + "self_attn.q_norm.weight": (head,),
            prefix + "self_attn.k_norm.weight": (head,),
            prefix + "post_attention_layernorm.weight": (hidden,),
            prefix + "mlp.gate_proj.weight": (ffn, hidden),
            prefix + "mlp.up_proj.weight": (ffn, hidden),
            prefix + "mlp.down_proj.weight": (hidden, ffn),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def write_folder(
    folder: Path,
    tensors: dict[str, Tensor],
    *,
    dtype: str = "float32",
    tokenizer: bool = True,
    num_shards: int = 1,
    **config: Any,
) -> Path:
    """Writes tensors as a Hugging Face folder; ``config`` changes fields of config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "torch_dtype": dtype, **config}))
    if tokenizer:
        save_tokenizer(folder)
    names = sorted(tensors)
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    where = {}
    for number in range(num_shards):
        file = f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors"
        part = names[number::num_shards]
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def make_family(
    root: Path,
    count: int,
    *,
    dtype: torch.dtype = torch.float32,
    spread: float = 0.1,
    seed: int = 0,
    tokenizer: bool = True,
    **config: Any,
) -> list[Path]:
    """A base and ``count`` branches that moved from it by ``spread`` of its size; returns base first."""
    generator = torch.Generator().manual_seed(seed)
    shapes = shapes_of({**CONFIG, **config})
    base = {name: torch.randn(shape, generator=generator) * 0.05 for name, shape in shapes.items()}
    folders = []
    for number in range(count + 1):
        values = {
            name: (
                value + (spread * 0.05 * torch.randn(value.shape, generator=generator) if number else 0)
            ).to(dtype)
            for name, value in base.items()
        }
        name = f"branch{number - 1}" if number else "base"
        kind = str(dtype).removeprefix("torch.")
        folders.append(write_folder(root / name, values, dtype=kind, tokenizer=tokenizer, **config))
    return folders


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, over its shards."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def joint_checkpoint(
    root: Path, branches: Mapping[str, Path], model: Path, *, frozen: str | None = None
) -> Path:
    """A joint checkpoint whose branches hold the tensors of converted folders."""
    folder = root / "checkpoints" / "step_000004"
    entries = {}
    for name, source in branches.items():
        shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("hf"))
        entries[name] = BranchEntry(
            weight_version=4,
            layout={"tp": 1, "pp": 1, "cp": 1, "ep": 1, "dp": 1},
            frozen=name == frozen,
            model_path=str(model),
            dims=asdict(read_sizes(model)),
            files=tuple(
                FileEntry(
                    path=f"{name}/{p.name}", num_bytes=p.stat().st_size, sha256=hash_file(p)
                )
                for p in sorted((folder / name).iterdir())
            ),
        )  # fmt: skip
    write_manifest(folder, Manifest(step=4, branches=entries, config="run: {}", saved_at="2026-01-01"))
    return folder
