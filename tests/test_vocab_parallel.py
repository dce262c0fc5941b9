"""Log-probabilities, entropy and top-k over a split vocabulary, against torch on the whole one."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from copd_megatron.policy.head import (
    VocabShard,
    linear_full_logprobs,
    linear_logprobs,
    linear_topk,
)
from tests.support.distributed import run_distributed

VOCAB = 37
HIDDEN = 12
POSITIONS = 23


def _inputs(vocab: int = VOCAB, positions: int = POSITIONS, hidden: int = HIDDEN) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden": torch.randn(positions, hidden, generator=generator),
        "weight": torch.randn(vocab, hidden, generator=generator),
        "targets": torch.randint(0, vocab, (positions,), generator=generator),
        "grad_logprobs": torch.randn(positions, generator=generator),
        "grad_entropy": torch.randn(positions, generator=generator),
    }


def _reference(inputs: dict[str, Tensor], temperature: float) -> dict[str, Tensor]:
    """Plain torch in float64 on the whole vocabulary."""
    hidden = inputs["hidden"].double().requires_grad_()
    weight = inputs["weight"].double().requires_grad_()
    full = (hidden @ weight.t() / temperature).log_softmax(-1)
    logprobs = full.gather(1, inputs["targets"][:, None]).squeeze(1)
    entropy = -(full.exp() * full).sum(-1)
    loss = (logprobs * inputs["grad_logprobs"]).sum() + (entropy * inputs["grad_entropy"]).sum()
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return {
        "logprobs": logprobs.detach(),
        "entropy": entropy.detach(),
        "full": full.detach(),
        "grad_hidden": hidden.grad,
        "grad_weight": weight.grad,
    }


def _run(
    inputs: dict[str, Tensor], shard: VocabShard, width: int, temperature: float, chunk: int
) -> dict[str, Tensor]:
    """Ours, on a slice [start, start + width) of a weight padded with rubbish beyond the vocabulary."""
    vocab, hidden_size = inputs["weight"].shape
    padded = torch.full((shard.start + width, hidden_size), 1e3)
    rows = min(vocab, shard.start + width)
    padded[:rows] = inputs["weight"][:rows]
    hidden = inputs["hidden"].clone().requires_grad_()
    weight = padded[shard.start :].clone().requires_grad_()
    logprobs, entropy = linear_logprobs(
        hidden, weight, inputs["targets"], shard=shard, temperature=temperature, chunk_tokens=chunk
    )
    ((logprobs * inputs["grad_logprobs"]).sum() + (entropy * inputs["grad_entropy"]).sum()).backward()
    values, ids = linear_topk(hidden, weight, 5, shard=shard, temperature=temperature, chunk_tokens=chunk)
    assert hidden.grad is not None
    assert weight.grad is not None
    return {
        "logprobs": logprobs.detach(),
        "entropy": entropy.detach(),
        "full": linear_full_logprobs(hidden, weight, shard=shard, temperature=temperature),
        "grad_hidden": hidden.grad,
        "grad_weight": weight.grad,
        "top_values": values,
        "top_ids": ids,
    }


def _close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected.float(), atol=2e-5, rtol=2e-5)


def _check(parts: list[dict[str, Tensor]], inputs: dict[str, Tensor], temperature: float) -> None:
    expected = _reference(inputs, temperature)
    for part in parts:
        for name in ("logprobs", "entropy", "grad_hidden"):
            _close(part[name], expected[name])
        top = expected["full"].topk(5)
        _close(part["top_values"], top.values)
        assert torch.equal(part["top_ids"], top.indices)
    _close(torch.cat([part["full"] for part in parts], dim=1), expected["full"])
    vocab = len(expected["grad_weight"])
    grad_weight = torch.cat([part["grad_weight"] for part in parts])
    _close(grad_weight[:vocab], expected["grad_weight"])
    assert not grad_weight[vocab:].any(), "padding has no gradient"


CASES = list(itertools.product((1.0, 0.7, 2.5), (4, POSITIONS, 1000)))


@pytest.mark.parametrize(("temperature", "chunk"), CASES)
@pytest.mark.parametrize("padding", [0, 3])
def test_one_rank_equals_torch(temperature: float, chunk: int, padding: int) -> None:
    inputs = _inputs()
    shard = VocabShard(group=None, start=0, vocab_size=VOCAB)
    _check([_run(inputs, shard, VOCAB + padding, temperature, chunk)], inputs, temperature)


def _both_ranks() -> dict[str, list[dict[str, Tensor]]]:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    results = {}
    # the odd vocabulary leaves one padded row on the last rank; 37 of 80 leaves that rank nothing but padding
    for name, width in (("odd", -(-VOCAB // 2)), ("all padding", 40)):
        shard = VocabShard(group=dist.group.WORLD, start=rank * width, vocab_size=VOCAB)
        results[name] = [_run(_inputs(), shard, width, *case) for case in CASES]
    dist.barrier()
    dist.destroy_process_group()
    return results


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, list[dict[str, Tensor]]]]:
    return run_distributed(_both_ranks, 2)


@pytest.mark.parametrize("split", ["odd", "all padding"])
@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"t{t}-chunk{c}" for t, c in CASES])
def test_two_ranks_equal_torch(
    two_ranks: list[dict[str, list[dict[str, Tensor]]]], split: str, case: int
) -> None:
    _check([rank[split][case] for rank in two_ranks], _inputs(), CASES[case][0])


def test_gradient_equals_finite_differences() -> None:
    """Independent of torch's own derivative of log-softmax."""
    inputs = _inputs(vocab=11, positions=3, hidden=4)
    shard = VocabShard(group=None, start=0, vocab_size=11)

    def loss(hidden: Tensor) -> Tensor:
        full = (hidden @ inputs["weight"].double().t() / 0.9).log_softmax(-1)
        logprobs = full.gather(1, inputs["targets"][:, None]).squeeze(1)
        entropy = -(full.exp() * full).sum(-1)
        return (logprobs * inputs["grad_logprobs"] + entropy * inputs["grad_entropy"]).sum()

    mine = _run(inputs, shard, 11, 0.9, 2)["grad_hidden"]
    hidden, step = inputs["hidden"].double(), 1e-5
    for i, j in itertools.product(range(3), range(4)):
        bump = torch.zeros_like(hidden)
        bump[i, j] = step
        slope = (loss(hidden + bump) - loss(hidden - bump)) / (2 * step)
        assert float(mine[i, j]) == pytest.approx(float(slope), abs=1e-4)


def test_extreme_logits_stay_finite() -> None:
    inputs = _inputs()
    inputs["weight"] *= 200
    shard = VocabShard(group=None, start=0, vocab_size=VOCAB)
    result = _run(inputs, shard, VOCAB + 3, 1.0, 8)
    assert all(
        result[name].isfinite().all() for name in ("logprobs", "entropy", "grad_hidden", "grad_weight")
    )
    assert result["entropy"].min() >= -1e-6


def test_top_k_beyond_the_vocabulary_is_refused() -> None:
    inputs = _inputs()
    shard = VocabShard(group=None, start=0, vocab_size=VOCAB)
    with pytest.raises(ValueError, match=r"k=38 must lie in 1\.\.37"):
        linear_topk(inputs["hidden"], inputs["weight"], 38, shard=shard)


class _LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation has returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return result


def test_no_tensor_of_tokens_by_vocabulary_exists() -> None:
    """Peak is one chunk of logits (or the weight's gradient), in forward and in backward."""
    positions, vocab, hidden, chunk = 512, 1000, 32, 16
    inputs = _inputs(vocab=vocab, positions=positions, hidden=hidden)
    shard = VocabShard(group=None, start=0, vocab_size=vocab)
    with _LargestTensor() as largest:
        _run(inputs, shard, vocab, 0.9, chunk)
        # the last, linear_full_logprobs, is for few states and makes [N, V] by contract
        unchunked = largest.numel
    assert unchunked == positions * vocab, "the recorder sees what it is meant to see"
    states = inputs["hidden"].requires_grad_()
    weight = inputs["weight"].requires_grad_()
    with _LargestTensor() as largest:
        logprobs, entropy = linear_logprobs(
            states, weight, inputs["targets"], shard=shard, temperature=0.9, chunk_tokens=chunk
        )
        (logprobs.sum() + entropy.sum()).backward()
        linear_topk(states, weight, 5, shard=shard, chunk_tokens=chunk)
    assert weight.grad is not None
    assert largest.numel == max(chunk * vocab, vocab * hidden, positions * hidden)
