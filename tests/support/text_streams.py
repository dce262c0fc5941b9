"""Streams of text prompts, and the tokenizers they need."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from copd_megatron.data import PromptReader, PromptStream, ShardSet
from tests.support.byte_tokenizer import byte_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@functools.cache
def plain_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, no chat template."""
    return byte_tokenizer()


@functools.cache
def chat_tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(chat_template=CHATML)


def reader_of(
    pattern: str,
    tokenizer: PreTrainedTokenizerFast | None = None,
    *,
    max_prompt_tokens: int = 1024,
    domain: str = "text",
    **options: Any,
) -> PromptReader:
    return PromptReader(
        ShardSet.open([pattern]),
        tokenizer or plain_tokenizer(),
        domain=domain,
        max_prompt_tokens=max_prompt_tokens,
        **options,
    )


def stream_of(
    pattern: str,
    tokenizer: PreTrainedTokenizerFast | None = None,
    *,
    seed: int = 1,
    shuffle: bool = True,
    **options: Any,
) -> PromptStream:
    return PromptStream(reader_of(pattern, tokenizer, **options), seed=seed, shuffle=shuffle)
