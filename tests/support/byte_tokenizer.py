"""A tokenizer with one token per byte: any text encodes and comes back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TURN = "<|im_end|>"
PADDING = "<|endoftext|>"


def byte_tokenizer(special_tokens: Sequence[str] = (), **fields: Any) -> PreTrainedTokenizerFast:
    """Ids 0 to 255 are bytes; ``special_tokens`` follow in their order.

    Args:
        fields: arguments of ``PreTrainedTokenizerFast``, such as ``chat_template``.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special_tokens])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **fields)


def save_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Writes a byte tokenizer whose ids 256 and 257 are end of turn and padding."""
    tokenizer = byte_tokenizer((END_OF_TURN, PADDING), eos_token=END_OF_TURN, pad_token=PADDING)
    tokenizer.save_pretrained(folder)
    return tokenizer
