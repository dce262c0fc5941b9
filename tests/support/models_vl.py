"""Tiny random Qwen3-VL folders with a real ``Qwen3VLProcessor``, for tests with the real engines.

Weights come from a seed. They are larger than the usual initialisation, so that distributions are far from
uniform and an error in any tensor shows in the log-probabilities.

transformers is imported when a model is made, not when pytest collects.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from copd_megatron.config import MediaConfig
from tests.support.byte_tokenizer import END_OF_TURN, PADDING, byte_tokenizer

if TYPE_CHECKING:
    from transformers import Qwen3VLConfig, Qwen3VLMoeConfig, Qwen3VLProcessor

START_OF_TURN = "<|im_start|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
SPECIAL_TOKENS = (PADDING, START_OF_TURN, END_OF_TURN, VISION_START, VISION_END, IMAGE, VIDEO)
"""Ids 256 to 262, in this order."""

TOKEN_IDS = {token: 256 + i for i, token in enumerate(SPECIAL_TOKENS)}

CHAT_TEMPLATE = """\
{%- macro render(content) -%}
{%- if content is string -%}{{ content }}
{%- else -%}
{%- for part in content -%}
{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'video' -%}<|vision_start|><|video_pad|><|vision_end|>
{%- else -%}{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' + render(message.content) + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""
"""Qwen's turns and vision markers, without tools and default system prompt."""

PATCH, MERGE, TEMPORAL = 8, 2, 2
MIN_PIXELS, MAX_PIXELS = 32 * 32, 128 * 128
VIDEO_MIN_PIXELS, VIDEO_MAX_PIXELS = 2 * 32 * 32, 32 * 64 * 64

MEDIA = MediaConfig(frame_rate=4.0, min_frames=2, num_workers=2)
"""How the ``processor`` fixture reads images and videos."""


def make_processor() -> Qwen3VLProcessor:
    """A byte-level tokenizer (ids 0..255 are bytes) and processors for 8 x 8 patches, merged 2 x 2."""
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    tokenizer = byte_tokenizer(
        SPECIAL_TOKENS, eos_token=END_OF_TURN, pad_token=PADDING, chat_template=CHAT_TEMPLATE
    )
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(TOKEN_IDS.values())
    common: dict[str, Any] = {
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": TEMPORAL,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(
            size={"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}, **common
        ),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(
            size={"shortest_edge": VIDEO_MIN_PIXELS, "longest_edge": VIDEO_MAX_PIXELS},
            fps=2,
            min_frames=2,
            max_frames=32,
            **common,
        ),
        chat_template=CHAT_TEMPLATE,
    )


EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}


def make_config(
    *, tied: bool, mixture: bool = False, text: dict[str, Any] | None = None, **vision: Any
) -> Qwen3VLConfig | Qwen3VLMoeConfig:
    """About 1.1 M parameters; ``text`` and ``vision`` replace single fields; with ``mixture``, four small
    experts a layer.

    The untied vocabulary, 323, is odd: tensor parallelism pads it.
    """
    from transformers import Qwen3VLConfig, Qwen3VLMoeConfig

    return (Qwen3VLMoeConfig if mixture else Qwen3VLConfig)(
        text_config={
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "vocab_size": 320 if tied else 323,
            "max_position_embeddings": 2048,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 100000.0,
                "mrope_section": [8, 4, 4],
                "mrope_interleaved": True,
            },
            "tie_word_embeddings": tied,
            "eos_token_id": TOKEN_IDS[END_OF_TURN],
            "pad_token_id": TOKEN_IDS[PADDING],
            **(EXPERTS if mixture else {}),
            **(text or {}),
        },
        vision_config={
            "depth": 3,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": TEMPORAL,
            "out_hidden_size": 128,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
            **vision,
        },
        image_token_id=TOKEN_IDS[IMAGE],
        video_token_id=TOKEN_IDS[VIDEO],
        vision_start_token_id=TOKEN_IDS[VISION_START],
        vision_end_token_id=TOKEN_IDS[VISION_END],
        tie_word_embeddings=tied,
    )


def make_vl_model(
    folder: Path,
    *,
    tied: bool = False,
    seed: int = 0,
    scale: float = 2.5,
    mixture: bool = False,
    text: dict[str, Any] | None = None,
    **vision: Any,
) -> Path:
    """Writes a random Qwen3-VL with its processor; ``text`` and ``vision`` are fields of its configs.

    A ``mixture`` is written as transformers 5 saves it: its stacks of experts are not transposed.
    """
    import torch
    from transformers import Qwen3VLForConditionalGeneration, Qwen3VLMoeForConditionalGeneration

    generator = torch.Generator().manual_seed(seed)
    kind: Any = Qwen3VLMoeForConditionalGeneration if mixture else Qwen3VLForConditionalGeneration
    model = kind(make_config(tied=tied, mixture=mixture, text=text, **vision)).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * 0.02 * scale)
            elif name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            else:
                parameter.copy_(1 + 0.1 * noise)
    model.generation_config.eos_token_id = TOKEN_IDS[END_OF_TURN]
    model.generation_config.pad_token_id = TOKEN_IDS[PADDING]
    model.save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return folder


def publish(folder: Path) -> Path:
    """Transposes a mixture's stacks of experts, as published folders have them."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file(
        {
            name: value.transpose(1, 2).contiguous() if ".experts." in name else value
            for name, value in tensors.items()
        },
        path,
        {"format": "pt"},
    )
    return folder
