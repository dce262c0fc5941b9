"""The layers that are written out for the CPU, against the plain formulas and torch's own gradients."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor


def _values_and_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    leaves = [values.clone().requires_grad_() for values in inputs]
    output = function(*leaves)
    slope = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=output.dtype)
    return [output.detach(), *torch.autograd.grad(output, leaves, slope)]


def _same(one: Callable[..., Tensor], other: Callable[..., Tensor], *inputs: Tensor) -> None:
    for mine, theirs in zip(
        _values_and_gradients(one, *inputs), _values_and_gradients(other, *inputs), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_swiglu() -> None:
    from copd_megatron.policy.megatron.few_passes import Swiglu

    def plain(halves: Tensor) -> Tensor:
        gate, up = halves.chunk(2, dim=-1)
        return F.silu(gate) * up

    _same(Swiglu(config=None), plain, _random(7, 1, 10))


@pytest.mark.parametrize("shape", [(7, 1, 6), (5, 3, 6)])
def test_rms_norm(shape: tuple[int, ...]) -> None:
    from copd_megatron.policy.megatron.few_passes import rms_norm

    def plain(values: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(values, (6,), weight, 1e-3)

    _same(lambda x, w: rms_norm(x, w, 1e-3), plain, _random(*shape), _random(6, seed=1))


def test_turn() -> None:
    from copd_megatron.policy.megatron.few_passes import Turn

    half = _random(7, 1, 4, seed=2)
    angles = torch.cat([half, half], dim=-1)

    def plain(heads: Tensor) -> Tensor:
        first, second = heads.chunk(2, dim=-1)
        return heads * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()

    _same(Turn.by(angles, torch.float64), plain, _random(7, 3, 8))


@pytest.mark.parametrize(
    "lengths", [[5], [4, 4, 4], [1, 2, 3, 9, 8, 1], [3, 4, 0, 4, 17], [8, 7, 4, 16]], ids=str
)
def test_sequences_of_a_pack_are_attended_to_each_on_its_own(lengths: list[int]) -> None:
    from copd_megatron.policy.megatron.attention import LengthGroups

    ends = torch.tensor(lengths).cumsum(0).tolist()
    plan = LengthGroups.at([0, *ends])

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (rows.transpose(-3, -2) for rows in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(
            -3, -2
        )

    def grouped(*packed: Tensor) -> Tensor:
        return plan.collect([attend(*rows) for rows in zip(*map(plan.spread, packed), strict=True)])

    def one_by_one(*packed: Tensor) -> Tensor:
        parts = zip(*(values.split(lengths) for values in packed), strict=True)
        return torch.cat([attend(*(rows.unsqueeze(0) for rows in part)).squeeze(0) for part in parts])

    total = ends[-1]
    inputs = (_random(total, 4, 8), _random(total, 2, 8, seed=1), _random(total, 2, 8, seed=2))
    _same(grouped, one_by_one, *inputs)
    assert (plan.moves is None) == (len(set(lengths)) == 1)


def test_rows_with_one_prompt_are_attended_to_as_if_each_had_its_own() -> None:
    """Values and gradients: those of the shared tokens are the sums over their rows."""
    from copd_megatron.policy.megatron.attention import LengthGroups

    prompts, groups = [3, 5, 1], [[2, 9, 1], [4], [7, 7]]
    tokens, lengths, end = [], [], 0
    for prompt, responses in zip(prompts, groups, strict=True):
        shared = list(range(end, end + prompt))
        end += prompt
        for response in responses:
            tokens += [*shared, *range(end, end + response)]
            lengths.append(prompt + response)
            end += response
    index = torch.tensor(tokens)
    plan = LengthGroups.at([0, *torch.tensor(lengths).cumsum(0).tolist()], index.numpy())

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows = (values.transpose(-3, -2) for values in (query, key, value))
        return F.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True).transpose(-3, -2)

    def shared_prompts(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts = plan.spread(query, read_once=True), plan.spread(key), plan.spread(value)
        return plan.collect([attend(*rows) for rows in zip(*parts, strict=True)])

    def own_prompts(*packed: Tensor) -> Tensor:
        parts = zip(*(values[index].split(lengths) for values in packed), strict=True)
        whole = torch.cat([attend(*(rows.unsqueeze(0) for rows in part)).squeeze(0) for part in parts])
        first = torch.tensor([tokens.index(token) for token in range(end)])
        return whole[first]

    inputs = (_random(end, 4, 8), _random(end, 2, 8, seed=1), _random(end, 2, 8, seed=2))
    _same(shared_prompts, own_prompts, *inputs)


def test_attention_that_knows_nothing_of_shared_prompts_sees_whole_rows() -> None:
    """As Transformer Engine's, which gets ordinary packs: the same values and gradients as the attention that
    brings rows together itself."""
    from copd_megatron.policy.batch.spread import Spread
    from copd_megatron.policy.megatron.attention import PackedAttention
    from copd_megatron.policy.megatron.media_sequences import MediaSeqParams, turning

    class OneByOne(torch.nn.Module):
        def __init__(self, config: SimpleNamespace) -> None:
            super().__init__()
            self.config = config

        def forward(self, *packed: Tensor, packed_seq_params: MediaSeqParams) -> Tensor:
            lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
            parts = zip(*(values.split(lengths) for values in packed[:3]), strict=True)
            rows = ([values.transpose(0, 1) for values in part] for part in parts)
            return torch.cat(
                [
                    F.scaled_dot_product_attention(*row, is_causal=True, enable_gqa=True).transpose(0, 1)
                    for row in rows
                ]
            )

    # a prompt of 3 tokens with responses of 2 and 4, then a row of 5 alone
    tokens = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8, 9, 10, 11, 12, 13])
    ends = torch.tensor([0, 5, 12, 17], dtype=torch.int32)
    angles = _random(14, 1, 1, 8, seed=5)
    config = SimpleNamespace(apply_rope_fusion=False)

    def attend(kind: type[Any]) -> Callable[..., Tensor]:
        def attended(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            core = turning(kind).__new__(turning(kind))
            torch.nn.Module.__init__(core)
            core.config, core.softmax_scale, core.cp_group = config, 8**-0.5, SimpleNamespace(size=lambda: 1)
            packed = MediaSeqParams(
                qkv_format="thd",
                cu_seqlens_q=ends,
                cu_seqlens_kv=ends,
                angles=angles,
                spread=Spread.at(tokens.numpy()),
            )
            result: Tensor = core(query, key, value, None, packed_seq_params=packed)
            return result

        return attended

    inputs = (_random(14, 4, 8), _random(14, 2, 8, seed=1), _random(14, 2, 8, seed=2))
    _same(attend(PackedAttention), attend(OneByOne), *inputs)
