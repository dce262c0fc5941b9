"""Streams of text prompts, and the tokenizers they need."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from copd_megatron.config.schema import DataConfig
from copd_megatron.data import PromptStream
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


def stream_of(
    pattern: str, tokenizer: PreTrainedTokenizerFast | None = None, *, seed: int = 1, **data: Any
) -> PromptStream:
    return PromptStream.from_config(
        DataConfig(train=[pattern], **data), tokenizer or plain_tokenizer(), domain="text", seed=seed
    )
