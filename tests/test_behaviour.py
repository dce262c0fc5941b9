"""``opd.behaviour`` against naive loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from copd_megatron.opd.behaviour import kl_divergence, symmetric_kl, topk_overlap

INF = math.inf


@settings(deadline=None)
@given(
    states=st.lists(
        st.tuples(st.permutations(range(9)), st.permutations(range(9))).map(lambda pair: (pair[0], pair[1])),
        max_size=5,
    ),
    k=st.integers(1, 9),
)
def test_overlap_counts_shared_ids(states: list[tuple[list[int], list[int]]], k: int) -> None:
    a = torch.tensor([pair[0][:k] for pair in states], dtype=torch.int64).reshape(-1, k)
    b = torch.tensor([pair[1][:k] for pair in states], dtype=torch.int64).reshape(-1, k)
    expected = [len(set(left[:k]) & set(right[:k])) / k for left, right in states]
    assert topk_overlap(a, b).tolist() == pytest.approx(expected)
    assert topk_overlap(b, a).tolist() == topk_overlap(a, b).tolist()


def test_overlap_examples() -> None:
    a = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    b = torch.tensor([[4, 3, 2, 1], [5, 6, 7, 8], [1, 9, 3, 0]])
    assert topk_overlap(a, b).tolist() == [1.0, 0.0, 0.5]


@pytest.mark.parametrize("shapes", [((2, 3), (2, 4)), ((2, 3), (3, 3)), ((3,), (3,)), ((2, 0), (2, 0))])
def test_overlap_refuses_shapes(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    a, b = (torch.zeros(shape, dtype=torch.int64) for shape in shapes)
    with pytest.raises(ValueError, match="must be"):
        topk_overlap(a, b)


def slow_kl(logp: list[float], logq: list[float]) -> float:
    total = 0.0
    for lp, lq in zip(logp, logq, strict=True):
        if lp == -INF:
            continue
        if lq == -INF:
            return INF
        total += math.exp(lp) * (lp - lq)
    return total


def random_logprobs(generator: torch.Generator, *, holes: bool) -> torch.Tensor:
    logits = 2 * torch.randn(6, 11, generator=generator, dtype=torch.float64)
    if holes:
        logits[torch.rand(6, 11, generator=generator) < 0.1] = -INF
        logits[:, 0] = 0.0
    return logits.log_softmax(-1)


@pytest.mark.parametrize("holes", [False, True])
def test_divergences_equal_loops(holes: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    outcomes = set()
    for _ in range(10):
        p, q = (random_logprobs(generator, holes=holes) for _ in range(2))
        if holes:
            q = torch.where(p == -INF, -INF, q)
        forward = [slow_kl(*pair) for pair in zip(p.tolist(), q.tolist(), strict=True)]
        backward = [slow_kl(*pair) for pair in zip(q.tolist(), p.tolist(), strict=True)]
        assert kl_divergence(p, q).tolist() == pytest.approx(forward, rel=1e-12)
        assert kl_divergence(q, p).tolist() == pytest.approx(backward, rel=1e-12)
        both = [a + b for a, b in zip(forward, backward, strict=True)]
        assert symmetric_kl(p, q).tolist() == pytest.approx(both, rel=1e-12)
        assert symmetric_kl(q, p).tolist() == pytest.approx(both, rel=1e-12)
        outcomes |= {math.isinf(value) for value in both}
    assert outcomes == ({False, True} if holes else {False})


def test_divergences_of_equal_and_of_disjoint_distributions() -> None:
    half = math.log(0.5)
    p = torch.tensor([[half, half, -INF, -INF]])
    q = torch.tensor([[-INF, -INF, half, half]])
    assert kl_divergence(p, p).tolist() == symmetric_kl(p, p).tolist() == [0.0]
    assert kl_divergence(p, q).tolist() == symmetric_kl(p, q).tolist() == [INF]


def test_symmetric_kl_is_the_sum_not_the_mean() -> None:
    p, q = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.25, 0.75]]).log()
    one_way = 0.5 * math.log(3)
    assert kl_divergence(p, q).item() == pytest.approx(one_way, rel=1e-6)
    assert symmetric_kl(p, q).item() == pytest.approx(2 * one_way, rel=1e-6)


def test_low_precision_inputs_are_computed_in_float32() -> None:
    p = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).log_softmax(-1).bfloat16()
    assert symmetric_kl(p, p.roll(1, -1)).dtype is torch.float32
    with pytest.raises(ValueError, match=r"both must be \[S, V\]"):
        kl_divergence(p, p[:2])
