"""The model, the prompts and the configuration of ``bench_step.py``, and what the work costs at least."""

from __future__ import annotations

import json
import random
import string
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PROMPT, RESPONSE = 25, 48
"""Tokens of every prompt and of every response."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model of the Qwen3 family, and the rows of a step."""

    name: str
    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    ffn: int
    vocab: int
    prompts: int
    generations: int = 8
    micro_batch_tokens: int = 8192
    kv_gib: float = 1.0

    @property
    def rows(self) -> int:
        return self.prompts * self.generations


SIZES = {
    "1M": Size(
        name="1M", hidden=128, layers=4, heads=4, key_value_heads=2, head_dim=32, ffn=448, vocab=512,
        prompts=32,
    ),
    "90M": Size(
        name="90M", hidden=768, layers=12, heads=12, key_value_heads=4, head_dim=64, ffn=2048, vocab=16384,
        prompts=8,
    ),
}  # fmt: skip


def make_model(folder: Path, size: Size) -> None:
    """Random weights. The end-of-sequence token lies behind the model's vocabulary, so that nobody samples it
    and every response has full length."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from copd_megatron.tiny.tokenizer import build_tokenizer

    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_value_heads,
        head_dim=size.head_dim,
        intermediate_size=size.ffn,
        vocab_size=size.vocab,
        tie_word_embeddings=True,
        max_position_embeddings=512,
        eos_token_id=size.vocab,
    )
    Qwen3ForCausalLM(config).float().save_pretrained(folder)
    tokenizer = build_tokenizer(size.vocab + 1)
    tokenizer.chat_template = None
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(size.vocab)
    tokenizer.save_pretrained(folder)


def make_work(folder: Path, size: Size, *, ranks: int) -> dict[str, Any]:
    """Writes prompts as shards and the configuration of ``ranks`` data-parallel ranks; returns what the other
    processes need to know. One byte is one token."""
    import yaml

    from copd_megatron.data.convert.write import NewSample, write_shards

    rng = random.Random(0)
    texts = ["".join(rng.choices(string.ascii_letters, k=PROMPT)) for _ in range(4 * size.prompts)]
    write_shards(
        [NewSample(prompt=text, answer="7", verifier="numeric") for text in texts],
        folder / "data",
        "train",
        overwrite=True,
    )
    config = folder / f"ours_{ranks}.yaml"
    config.write_text(yaml.safe_dump(_config(folder, size, ranks)))
    tokenizer = json.loads((folder / "model" / "tokenizer.json").read_text())["model"]["vocab"]
    return {
        **asdict(size),
        "model": str(folder / "model"),
        "config": str(config),
        "trl_output": str(folder / "trl"),
        "texts": texts,
        "ids": [[tokenizer[letter] for letter in text] for text in texts[: size.prompts]],
        "prompt": PROMPT,
        "response": RESPONSE,
        "lr": 1e-6,
    }


def _config(folder: Path, size: Size, ranks: int) -> dict[str, Any]:
    return {
        "run": {"name": "bench", "dir": str(folder / f"run_{ranks}"), "device": "cpu", "overwrite": True},
        "model": {"path": str(folder / "model"), "max_sequence_tokens": PROMPT + RESPONSE},
        "branches": {
            "policy": {
                "num_prompts_per_step": size.prompts,
                "num_generations_per_prompt": size.generations,
                "parallel": {"data_parallel_size": ranks},
                "rollout": {
                    "max_new_tokens": RESPONSE,
                    "max_num_seqs": size.rows,
                    "cpu_kv_cache_gib": size.kv_gib,
                },
                "data": {"train": [str(folder / "data" / "train-*.tar")], "max_prompt_tokens": PROMPT},
                "reward": {"verifiers": ["numeric"]},
            }
        },
        "schedule": {"cycles": 1, "rlvr_steps": 10**4, "opd_steps": 0},
        "loss": {"kl_coefficient": 0.0},
        "optimizer": {"lr": 1e-6, "lr_warmup_steps": 0},
        "training": {"micro_batch_tokens": size.micro_batch_tokens},
        "evaluation": {"every_steps": 0},
        "checkpoint": {"save_period": 0},
        "logging": {"console": False},
    }


def flops(folder: Path, size: Size) -> dict[str, float]:
    """Floating-point operations that a step cannot do without: products of matrices, and attention's, with a
    prompt's tokens computed once for its whole group, when sampling as in the update.

    A product with a weight costs 2 a token, its backward pass twice as much; causal attention 2 x query size
    x length ** 2 a row and layer (``CostModel``). The vocabulary meets response tokens only.
    """
    from copd_megatron.hf.model_config import read_model_shape

    shape = read_model_shape(folder / "model")
    layers = shape.num_layers * shape.active_layer_parameters
    attention = 2 * shape.num_layers * shape.num_attention_heads * shape.head_dim
    length, head = PROMPT + RESPONSE, shape.hidden_size * shape.vocab_size
    response = size.rows * RESPONSE
    again = attention * PROMPT**2 * (size.rows - size.prompts)
    once = 2 * layers * (size.prompts * PROMPT + response) + 2 * head * response
    once += attention * size.rows * length**2 - again
    return {"update": 3.0 * once, "sampling": once}
