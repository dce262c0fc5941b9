"""Tiny Qwen3 folders, data and prompts for tests with the real engines.

Weights come from a seed; they are scaled up from the usual initialisation, so that distributions are far
from uniform and an error in any tensor shows in the log-probabilities.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from copd_megatron.config.schema import ParallelConfig, TrainingConfig
from copd_megatron.data.convert.write import WrittenDomain
from copd_megatron.records import IntArray
from copd_megatron.tiny.tasks.text import Family, write_domain

if TYPE_CHECKING:  # Megatron takes seconds to import, and most tests that make a model do without
    from copd_megatron.policy.actor import MegatronActor

END_OF_TURN = "<|im_end|>"
PADDING = "<|endoftext|>"

ARITHMETIC = Family(
    name="chain_sum", settings={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
)
DIVISORS = Family(name="gcd", settings={"min_value": 2, "max_value": 60})


def save_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer, ids 0..255 for bytes, then end of turn and padding."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(tokenizer_models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TURN, special=True), AddedToken(PADDING, special=True)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TURN, pad_token=PADDING)
    fast.save_pretrained(folder)
    return fast


def make_model(folder: Path, *, seed: int = 0, scale: float = 5.0, **sizes: Any) -> Path:
    """Writes a random Qwen3 of about 0.2 M parameters with its tokenizer; ``sizes`` are Qwen3Config fields
    (with ``num_experts``, Qwen3MoeConfig's).

    The default vocabulary, 321, is odd: tensor parallelism pads it.
    """
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


@dataclass(frozen=True, kw_only=True)
class Text:
    """A token sequence with the boundary that scoring needs."""

    token_ids: IntArray
    prompt_length: int

    @property
    def response_length(self) -> int:
        return len(self.token_ids) - self.prompt_length


def random_texts(count: int, vocab_size: int, *, seed: int = 0, longest: int = 50) -> list[Text]:
    """Sequences of different lengths, some with one response token; the last vocabulary entry occurs."""
    rng = np.random.default_rng(seed)
    texts = []
    for i in range(count):
        length = int(rng.integers(4, longest))
        tokens = rng.integers(0, vocab_size, size=length).astype(np.int32)
        tokens[-1] = vocab_size - 1
        texts.append(Text(token_ids=tokens, prompt_length=length - 1 if i % 4 == 0 else max(1, length // 3)))
    return texts


@functools.lru_cache(maxsize=8)
def reference_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' own model of a folder."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def reference_distributions(
    folder: Path, token_ids: IntArray, prompt_length: int, temperature: float = 1.0
) -> np.ndarray:
    """[R, V] log-probabilities of every response position under transformers."""
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


def make_domains(out: Path, *, num_train: int = 48, num_validation: int = 8) -> dict[str, WrittenDomain]:
    """Shards of two small domains, ``alpha`` (sums) and ``beta`` (greatest common divisors)."""
    return {
        name: write_domain(out, name, [family], num_train=num_train, num_validation=num_validation, seed=seed)
        for name, family, seed in (("alpha", ARITHMETIC, 1), ("beta", DIVISORS, 2))
    }


def warm_up(
    folder: Path, pairs: list[tuple[str, str]], *, steps: int, seed: int = 0, lr: float = 3e-3
) -> None:
    """Supervised steps on (prompt, answer) pairs, so that some sampled answers are right."""
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


def load_and_compare(
    parallel: ParallelConfig, model: Path, checkpoint: Path
) -> tuple[MegatronActor, list[str]]:
    """An actor of a Hugging Face folder, loaded anew by Megatron from a checkpoint of the same weights; and
    the tensors that differ afterwards. Runs on every rank."""
    from copd_megatron.checkpoint.actor_state import load_weights
    from copd_megatron.policy.actor import MegatronActor

    actor = MegatronActor(
        model_path=model,
        parallel=parallel,
        training=TrainingConfig(),
        optimizer=None,
        dtype=torch.float32,
        max_tokens=64,
        temperature=1.0,
        seed=3,
        total_steps=1,
    )
    direct = {slot.name: actor.view.read(slot).clone() for slot in actor.view.local}
    with torch.no_grad():
        for parameter in actor.model.parameters():
            parameter.fill_(7.0)
    load_weights(actor, str(checkpoint))
    return actor, [s.name for s in actor.view.local if not torch.equal(actor.view.read(s), direct[s.name])]
