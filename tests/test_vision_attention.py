"""The vision tower's attention over all images at once: equal to transformers' own, one by one."""

from __future__ import annotations

import pytest
import torch

from copd_megatron.tiny.vl import build_processor, build_visual_model
from copd_megatron.tiny.vl_recipe import VL_BASE


@pytest.mark.parametrize(
    "grids",
    [[[1, 4, 4]], [[5, 4, 4], [3, 4, 4]], [[2, 4, 4], [1, 6, 12], [3, 4, 4], [1, 2, 2]]],
    ids=["one image", "two videos of one size", "sizes mixed"],
)
def test_features_and_gradients_equal_the_ones_of_a_loop_over_images(grids: list[list[int]]) -> None:
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

    from copd_megatron.policy.megatron.vision_attention import use_packed_attention

    torch.manual_seed(0)
    model = build_visual_model(VL_BASE, build_processor(VL_BASE))
    tower = model.model.visual
    assert isinstance(tower, Qwen3VLVisionModel)
    grid = torch.tensor(grids)
    pixels = torch.randn(int(grid.prod(-1).sum()), 3 * 2 * 8 * 8)
    results = []
    for packed in (False, True):
        if packed:
            use_packed_attention(tower)
        else:
            tower.config._attn_implementation = "sdpa"
        tower.zero_grad()
        seen = tower(pixels, grid_thw=grid, return_dict=True)
        features = torch.cat([seen.pooler_output, *seen.deepstack_features])
        features.square().sum().backward()
        results.append((features.detach(), [p.grad for p in tower.parameters()]))
    (features, gradients), (packed_features, packed_gradients) = results
    torch.testing.assert_close(packed_features, features, rtol=1e-5, atol=1e-6)
    for one, other in zip(gradients, packed_gradients, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
