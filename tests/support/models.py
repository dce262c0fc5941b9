"""Tiny Qwen3 folders for tests with the real engines, and the same models in transformers.

Weights come from a seed. They are larger than the usual initialisation, so that distributions are far from
uniform and an error in any tensor shows in the log-probabilities.

torch and transformers are imported when a model is made, so that pytest collects without transformers.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from copd_megatron.records import IntArray
from tests.support.byte_tokenizer import save_tokenizer

if TYPE_CHECKING:
    import torch


def make_model(folder: Path, *, seed: int = 0, scale: float = 5.0, **sizes: Any) -> Path:
    """Writes a random Qwen3 of about 0.2 M parameters with its tokenizer; ``sizes`` are Qwen3Config fields
    (with ``num_experts``, Qwen3MoeConfig's).

    The default vocabulary, 321, is odd: tensor parallelism pads it.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    settings = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,  # the smallest that vLLM's CPU attention knows
        "vocab_size": 321,
        "tie_word_embeddings": False,
        "max_position_embeddings": 512,
        "eos_token_id": 256,
        **sizes,
    }
    if "num_experts" in sizes:
        moe_config = Qwen3MoeConfig(**{"moe_intermediate_size": 32, "norm_topk_prob": True, **settings})
        model: Any = Qwen3MoeForCausalLM(moe_config).float()
        initializer_range = moe_config.initializer_range
    else:
        config = Qwen3Config(**settings)
        model, initializer_range = Qwen3ForCausalLM(config).float(), config.initializer_range
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if parameter.ndim == 1 else noise * initializer_range * scale)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@functools.lru_cache(maxsize=8)
def reference_model(folder: Path, dtype: str | torch.dtype = "float32") -> Any:
    """transformers' own model of a folder."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def reference_distributions(
    folder: Path, token_ids: IntArray, prompt_length: int, temperature: float = 1.0
) -> np.ndarray:
    """[R, V] log-probabilities of every response position under transformers."""
    import torch

    with torch.no_grad():
        ids = torch.from_numpy(token_ids.astype(np.int64))[None]
        logits = reference_model(folder)(input_ids=ids).logits[0, prompt_length - 1 : -1]
        return (logits.float() / temperature).log_softmax(-1).numpy()


def reference_logprobs(
    folder: Path, token_ids: IntArray, prompt_length: int, temperature: float = 1.0
) -> np.ndarray:
    """[R] log-probabilities of the response tokens under transformers."""
    full = reference_distributions(folder, token_ids, prompt_length, temperature)
    return full[np.arange(len(full)), token_ids[prompt_length:]]


def warm_up(
    folder: Path, pairs: list[tuple[str, str]], *, steps: int, seed: int = 0, lr: float = 3e-3
) -> None:
    """Supervised steps on (prompt, answer) pairs, so that some sampled answers are right."""
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    texts = [(tokenizer.encode(p), [*tokenizer.encode(a), tokenizer.eos_token_id]) for p, a in pairs]
    longest = max(len(p) + len(a) for p, a in texts)
    ids = torch.full((len(texts), longest), tokenizer.pad_token_id)
    labels = torch.full_like(ids, -100)
    for i, (prompt, answer) in enumerate(texts):
        ids[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    for _ in range(steps):
        batch = torch.randperm(len(texts))[:16]
        loss = model(input_ids=ids[batch], labels=labels[batch]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
