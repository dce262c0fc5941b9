"""Qwen3-VL on Megatron: a vision tower before the decoder, its features inside the first decoder layers.

The tower is transformers' own module, on the first pipeline stage, the same on every tensor-parallel rank.
Its output takes the place of the placeholder tokens' embeddings; its deepstack feature maps are added to the
hidden states at those places after decoder layers 0, 1, ... Positions are (time, height, width) triples, and
the rotary frequencies interleave the three (Qwen3-VL; Megatron's own multimodal RoPE chunks them).

Shape legend: ``b`` rows, ``s`` tokens, ``H`` hidden, ``M`` visual tokens of the micro-batch, ``P`` patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import MultimodalRotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from torch import Tensor
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from copd_megatron.policy.positions import VisionBatch
from copd_megatron.policy.vision_attention import use_packed_attention


class InterleavedMultimodalRotaryEmbedding(MultimodalRotaryEmbedding):
    """Rotary angles for (time, height, width) positions, frequencies interleaved T H W T H W ... T T."""

    def forward(self, position_ids: Tensor, mrope_section: Sequence[int], cp_group: Any = None) -> Tensor:
        """Angles [s, b, 1, head_dim] from positions [3, b, s]."""
        position = position_ids.to(device=self.inv_freq.device, dtype=torch.float32)
        freqs = position[..., None] * self.inv_freq  # [3, b, s, head_dim / 2]
        mixed = freqs[0].clone()
        for axis in (1, 2):
            where = slice(axis, 3 * mrope_section[axis], 3)
            mixed[..., where] = freqs[axis][..., where]
        return torch.cat((mixed, mixed), dim=-1).transpose(0, 1)[:, :, None, :].contiguous()


class VisionLanguageModel(GPTModel):
    """Megatron's GPT decoder with Qwen3-VL's vision tower in front (first pipeline stage only)."""

    def __init__(self, *, vision_config: dict[str, Any], freeze_vision: bool, **kwargs: Any) -> None:
        # The tower's outputs go in before the tokens are split over ranks, so the embedding must not split.
        super().__init__(position_embedding_type="mrope", scatter_embedding_sequence_parallel=False, **kwargs)
        self.rotary_pos_emb = InterleavedMultimodalRotaryEmbedding(
            kv_channels=self.config.kv_channels,
            rotary_percent=1.0,
            rotary_base=self.rotary_base,
        )
        self._deepstack: list[Tensor] = []
        self._scatter_index: Tensor | None = None
        if not self.pre_process:
            return
        settings = Qwen3VLVisionConfig(**vision_config)
        self.visual = Qwen3VLVisionModel(settings).to(self.config.params_dtype)
        use_packed_attention(self.visual)
        if freeze_vision:
            self.visual.requires_grad_(False)
        for number, layer in enumerate(self.decoder.layers[: len(settings.deepstack_visual_indexes)]):
            layer.register_forward_hook(_DeepstackHook(self, number))

    def forward(self, input_ids: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As ``GPTModel.forward``, with ``position_ids`` [3, b, s] and ``vision``: a VisionBatch or None.

        Without media the tower is skipped, and its gradient is zero.
        """
        vision: VisionBatch | None = kwargs.pop("vision", None)
        self._deepstack, self._scatter_index = [], None
        if self.pre_process and vision is not None:
            kwargs["decoder_input"] = self._embed(input_ids, vision)
        output: Tensor = super().forward(input_ids, position_ids, *args, **kwargs)
        self._deepstack, self._scatter_index = [], None
        return output

    def _embed(self, input_ids: Tensor, vision: VisionBatch) -> Tensor:
        """Token embeddings with the tower's outputs at the placeholders: [s, b, H], or under sequence
        parallelism this rank's share of s."""
        text = self.embedding(input_ids=input_ids, position_ids=None)
        seen = self.visual(vision.pixel_values.to(text.dtype), grid_thw=vision.grid_thw, return_dict=True)
        features = [seen.pooler_output, *seen.deepstack_features]
        if vision.taken is not None:  # context parallelism: the tower sees whole images, the decoder a part
            features = [feature.index_select(0, vision.taken) for feature in features]
        self._deepstack = features[1:]
        self._scatter_index = vision.scatter_index
        flat = text.reshape(-1, text.shape[-1])
        mixed = flat.index_copy(0, vision.scatter_index, features[0].to(text.dtype)).view_as(text)
        return self._scatter(mixed)

    def _scatter(self, values_sbh: Tensor) -> Tensor:
        """This rank's share under sequence parallelism; its gradient is gathered from all ranks, so that the
        tower, which every rank runs whole, gets the same whole gradient on each."""
        if not self.config.sequence_parallel:
            return values_sbh
        return scatter_to_sequence_parallel_region(values_sbh)

    def add_deepstack(self, number: int, hidden_sbh: Tensor) -> Tensor:
        """Adds feature map ``number`` to the hidden states at the visual tokens."""
        if self._scatter_index is None:
            return hidden_sbh
        feature = self._deepstack[number].to(hidden_sbh.dtype)
        if self.config.sequence_parallel:
            ranks = self.config.tensor_model_parallel_size
            length, rows, width = hidden_sbh.shape
            whole = hidden_sbh.new_zeros(length * ranks * rows, width)
            whole = whole.index_add(0, self._scatter_index, feature).view(length * ranks, rows, width)
            return hidden_sbh + self._scatter(whole)
        flat = hidden_sbh.reshape(-1, hidden_sbh.shape[-1])
        return flat.index_add(0, self._scatter_index, feature).view_as(hidden_sbh)


class _DeepstackHook:
    """Runs after a decoder layer, whose output is (hidden states, context)."""

    def __init__(self, model: VisionLanguageModel, number: int) -> None:
        self.model, self.number = model, number

    def __call__(self, layer: Any, inputs: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        hidden, *rest = output
        return (self.model.add_deepstack(self.number, hidden), *rest)
