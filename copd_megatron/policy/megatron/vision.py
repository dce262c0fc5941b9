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

from copd_megatron.policy.batch.positions import VisionBatch
from copd_megatron.policy.megatron.media_sequences import Deepstack, MediaSeqParams
from copd_megatron.policy.megatron.vision_attention import use_packed_attention


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
        self.deepstack: Deepstack | None = None
        """Of the padded micro-batch that is in the forward pass."""
        if not self.pre_process:
            return
        # a mixture's tower has the fields and modules of a dense model's
        sizes = {name: value for name, value in vision_config.items() if name != "model_type"}
        settings = Qwen3VLVisionConfig(**sizes)
        tower = Qwen3VLVisionModel(settings)
        self._tower_frequencies = tower.rotary_pos_emb.inv_freq.clone()
        self.visual = tower
        self.visual.to(self.config.params_dtype)
        self._keep_frequencies()
        use_packed_attention(self.visual)
        if freeze_vision:
            self.visual.requires_grad_(False)
        elif self.config.recompute_granularity == "full":
            # else a long video's activations in the tower take more memory than all decoder layers
            self.visual.gradient_checkpointing_enable({"use_reentrant": False})
        for number, layer in enumerate(self.decoder.layers[: len(settings.deepstack_visual_indexes)]):
            layer.register_forward_hook(_DeepstackHook(self, number), with_kwargs=True)

    def _apply(self, *args: Any, **kwargs: Any) -> VisionLanguageModel:
        """What ``to``, ``cuda`` and ``bfloat16`` go through, Megatron's ``Float16Module`` too."""
        super()._apply(*args, **kwargs)
        self._keep_frequencies()
        return self

    def _keep_frequencies(self) -> None:
        """The tower's rotary frequencies stay in float32: in bfloat16, angles of far patches are off by a
        tenth."""
        if "visual" in self._modules:
            rotary = self.visual.rotary_pos_emb
            rotary.inv_freq = self._tower_frequencies.to(rotary.inv_freq.device)

    def forward(self, input_ids: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As ``GPTModel.forward``, with ``position_ids`` [3, b, s] and ``vision``: a VisionBatch or None.
        A pack's boundaries are ``MediaSeqParams``.

        Without media the tower is skipped, and its gradient is zero.
        """
        vision: VisionBatch | None = kwargs.pop("vision", None)
        deepstack = None
        if self.pre_process and vision is not None:
            kwargs["decoder_input"], deepstack = self._embed(input_ids, vision)
        packed: MediaSeqParams | None = kwargs.get("packed_seq_params")
        if packed is None:
            self.deepstack = deepstack
        else:
            packed.deepstack = deepstack
        output: Tensor = super().forward(input_ids, position_ids, *args, **kwargs)
        self.deepstack = None
        return output

    def _preprocess(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """As ``GPTModel``'s; a pack's rotary angles go with its boundaries, to attention that ``turning``
        makes, not to Megatron's layers."""
        hidden, angles, *rest = super()._preprocess(*args, **kwargs)
        packed: MediaSeqParams | None = kwargs["packed_seq_params"]
        if packed is None:
            return (hidden, angles, *rest)
        packed.angles = angles
        return (hidden, None, *rest)

    def _embed(self, input_ids: Tensor, vision: VisionBatch) -> tuple[Tensor, Deepstack]:
        """Token embeddings with the tower's outputs at the placeholders: [s, b, H], or under sequence
        parallelism this rank's share of s; and what goes in later."""
        text = self.embedding(input_ids=input_ids, position_ids=None)
        seen = self.visual(vision.pixel_values.to(text.dtype), grid_thw=vision.grid_thw, return_dict=True)
        features = [seen.pooler_output, *seen.deepstack_features]
        if vision.taken is not None:  # context parallelism: the tower sees whole images, the decoder a part
            features = [feature.index_select(0, vision.taken) for feature in features]
        flat = text.reshape(-1, text.shape[-1])
        mixed = flat.index_copy(0, vision.scatter_index, features[0].to(text.dtype)).view_as(text)
        mixed, later = self._scatter(mixed), features[1:]
        if self.config.recompute_granularity == "full" and torch.is_grad_enabled():
            leaves = [feature.detach().requires_grad_(feature.requires_grad) for feature in later]
            mixed, later = _GatherGradients.apply(mixed, leaves, *later), leaves
        return mixed, Deepstack(features=later, scatter_index=vision.scatter_index)

    def _scatter(self, values_sbh: Tensor) -> Tensor:
        """This rank's share under sequence parallelism; its gradient is gathered from all ranks, so that the
        tower, which every rank runs whole, gets the same whole gradient on each."""
        if not self.config.sequence_parallel:
            return values_sbh
        return scatter_to_sequence_parallel_region(values_sbh)

    def add_deepstack(self, deepstack: Deepstack, number: int, hidden_sbh: Tensor) -> Tensor:
        """Adds feature map ``number`` to the hidden states at the visual tokens."""
        feature, places = deepstack.features[number].to(hidden_sbh.dtype), deepstack.scatter_index
        if self.config.sequence_parallel:
            ranks = self.config.tensor_model_parallel_size
            length, rows, width = hidden_sbh.shape
            whole = hidden_sbh.new_zeros(length * ranks * rows, width)
            whole = whole.index_add(0, places, feature).view(length * ranks, rows, width)
            return hidden_sbh + self._scatter(whole)
        flat = hidden_sbh.reshape(-1, hidden_sbh.shape[-1])
        return flat.index_add(0, places, feature).view_as(hidden_sbh)


class _GatherGradients(torch.autograd.Function):
    """Hands on to the tower what recomputed layers left in leaves that stand for its feature maps.

    A layer that is computed again has a backward pass of its own, which must end at the layer: run on into
    the tower, it would do so once per layer. This function's backward comes after all layers', since the
    hidden states of the first pass through it.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, leaves: Sequence[Tensor], *features: Tensor) -> Tensor:
        ctx.leaves = leaves
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return (gradients[0], None, *(leaf.grad for leaf in ctx.leaves))


class _DeepstackHook:
    """Runs after a decoder layer, whose output is (hidden states, context)."""

    def __init__(self, model: VisionLanguageModel, number: int) -> None:
        self.model, self.number = model, number

    def __call__(
        self, layer: Any, inputs: Any, named: dict[str, Any], output: tuple[Tensor, Any]
    ) -> tuple[Tensor, Any]:
        packed: MediaSeqParams | None = named["packed_seq_params"]
        deepstack = self.model.deepstack if packed is None else packed.deepstack
        if deepstack is None:
            return output
        hidden, *rest = output
        return (self.model.add_deepstack(deepstack, self.number, hidden), *rest)
