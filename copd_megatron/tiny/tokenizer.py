"""A byte-level tokenizer with Qwen's special tokens and a compact chat template.

Ids 0..255 are bytes, so any text round-trips and the vocabulary takes few of a million parameters.
``<think>`` and ``</think>`` are single tokens that decoding keeps, as in Qwen3. The template is Qwen's, but
with the role as a single token: a user turn takes its bytes plus five tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import (  # type: ignore[import-untyped]
    AddedToken,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
)
from transformers import PreTrainedTokenizerFast

START_OF_TURN = "<|im_start|>"
END_OF_TURN = "<|im_end|>"
PADDING = "<|endoftext|>"
THINK = "<think>"
END_OF_THINKING = "</think>"
ROLES = ("system", "user", "assistant")

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'user', 'assistant'] -%}
{{ raise_exception('unknown role ' + message['role'] + ': use system, user or assistant') }}
{%- endif -%}
{{ '<|im_start|><|' + message['role'] + '|>' }}
{%- if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] if part['type'] == 'text' -%}
{{ part['text'] }}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|><|assistant|>' }}
{%- endif -%}"""


def build_tokenizer(vocab_size: int, extra_special_tokens: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """The tokenizer, padded with reserved tokens to exactly ``vocab_size``, so that every id of the model
    decodes.

    ``extra_special_tokens``: further special tokens, such as image placeholders.

    Raises ValueError if ``vocab_size`` is too small.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [START_OF_TURN, END_OF_TURN, PADDING, *(f"<|{role}|>" for role in ROLES), *extra_special_tokens]
    num_reserved = vocab_size - len(alphabet) - len(special) - 2
    if num_reserved < 0:
        raise ValueError(
            f"vocab_size {vocab_size} is too small: 256 bytes, {len(special)} special tokens and 2 thinking "
            f"marks need {vocab_size - num_reserved}. Raise it to a multiple of 64."
        )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(token, special=False) for token in (THINK, END_OF_THINKING)])
    tokenizer.add_special_tokens(
        [AddedToken(f"<|reserved_{index}|>", special=True) for index in range(num_reserved)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TURN,
        pad_token=PADDING,
        additional_special_tokens=[token for token in special if token not in (END_OF_TURN, PADDING)],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
