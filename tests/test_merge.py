"""The merge methods against a slow float64 reference, and the properties that their definitions promise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from copd_megatron.hf.tensors import BLOCK_ELEMENTS
from copd_megatron.merge.methods import Settings, merge_tensors
from copd_megatron.merge.sparsify import Magnitude, RandomMask
from tests.support import merge_reference as reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
WEIGHTS = (0.5, -0.25, 0.875)
"""Exact in binary: whether a sum of signs is zero must not depend on how the weights were rounded."""
SEVERAL_BLOCKS = 2 * BLOCK_ELEMENTS + 12_345


def tensors(count: int, shape: Sequence[int], dtype: torch.dtype, *, seed: int = 0) -> list[Tensor]:
    """A base and branches near it."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
    moved = [
        base + 0.1 * torch.randn(base.shape, generator=generator, dtype=torch.float64) for _ in range(count)
    ]
    return [value.to(dtype) for value in (base, *moved)]


def exact(values: Sequence[Tensor]) -> list[reference.Array]:
    return [value.double().numpy() for value in values]


def assert_rounded_once(merged: Tensor, expected: reference.Array) -> None:
    """Equal to the reference up to the rounding of the result (and float32 arithmetic)."""
    wanted = torch.from_numpy(expected)
    unit = torch.finfo(merged.dtype).eps
    # half a unit for rounding the result, and a few of float32's in between
    relative = 0.51 * unit + (4e-7 if merged.dtype != torch.float64 else 1e-15)
    torch.testing.assert_close(merged.double(), wanted, rtol=relative, atol=4e-7 if unit > 1e-10 else 1e-15)


def deltas_of(values: Sequence[Tensor]) -> list[reference.Array]:
    """Task vectors as both sides rank them: differences rounded to the tensors' type."""
    return [(v.double() - values[0].double()).numpy() for v in values[1:]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_linear(dtype: torch.dtype, normalize: bool) -> None:
    values = tensors(2, (17, 31), dtype)
    merged = merge_tensors("linear", values, Settings(weights=WEIGHTS, normalize=normalize))
    assert merged.dtype is dtype
    assert_rounded_once(merged, reference.linear(exact(values), WEIGHTS, normalize=normalize))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_task_arithmetic(dtype: torch.dtype, normalize: bool) -> None:
    values = tensors(3, (17, 31), dtype)
    merged = merge_tensors(
        "task_arithmetic", values, Settings(weights=WEIGHTS, normalize=normalize, scale=0.7)
    )
    expected = reference.task_vectors(
        exact(values)[0], deltas_of(values), WEIGHTS, elect=False, normalize=normalize, scale=0.7
    )
    assert_rounded_once(merged, expected)


def test_task_arithmetic_at_equal_weights_is_the_mean() -> None:
    values = tensors(4, (50,), torch.float64)
    quarter = Settings(weights=(0.25,) * 4)
    mean = torch.stack(values[1:]).mean(0)
    torch.testing.assert_close(
        merge_tensors("task_arithmetic", values, quarter), mean, rtol=1e-14, atol=1e-15
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
def test_ties(dtype: torch.dtype, normalize: bool, rescale: bool) -> None:
    values = tensors(3, (23, 41), dtype)
    densities = (0.3, 0.6, 1.0)
    merged = merge_tensors(
        "ties",
        values,
        Settings(weights=WEIGHTS, densities=densities, normalize=normalize, rescale=rescale, scale=1.5),
    )
    kept = []
    for delta, density in zip(deltas_of(values), densities, strict=True):
        # ranked as the inputs' type sees them, taken exactly
        ranked = torch.from_numpy(delta).to(dtype).double().numpy()
        chosen = reference.trim(ranked, density, rescale=False) != 0
        kept.append(reference.drop(delta, chosen | (density >= 1), rescale=rescale and density < 1))
    expected = reference.task_vectors(
        exact(values)[0], kept, WEIGHTS, elect=True, normalize=normalize, scale=1.5
    )
    assert_rounded_once(merged, expected)


def test_ties_by_hand() -> None:
    """Three branches, one element each: majority up, majority down, a tie of signs, nobody moved."""
    base = torch.zeros(4)
    branches = [
        torch.tensor(v) for v in ([3.0, -1.0, 2.0, 0.0], [1.0, -2.0, -2.0, 0.0], [-2.0, 1.0, 0.0, 0.0])
    ]
    merged = merge_tensors("ties", [base, *branches], Settings(weights=(1.0, 1.0, 1.0), normalize=True))
    assert merged.tolist() == [2.0, -1.5, 2.0, 0.0]


def test_trimming_over_several_blocks() -> None:
    """Exactly as many are kept as asked for, and none that is smaller than one dropped."""
    values = tensors(1, (SEVERAL_BLOCKS,), torch.bfloat16)  # bfloat16: thousands share a magnitude
    density = 0.37
    delta = (values[1].float() - values[0].float()).bfloat16().float()
    merged = merge_tensors("ties", values, Settings(weights=(1.0,), densities=(density,)))
    kept = merged != values[0]
    order = np.lexsort((np.arange(SEVERAL_BLOCKS), -delta.abs().numpy()))
    chosen = torch.zeros(SEVERAL_BLOCKS, dtype=torch.bool)
    chosen[torch.from_numpy(order[: int(density * SEVERAL_BLOCKS)].copy())] = True
    assert torch.equal(kept, chosen & (delta != 0))


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=60),
    density=st.floats(0, 0.99),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_trimming_keeps_the_right_number(values: list[float], density: float, dtype: torch.dtype) -> None:
    delta = torch.tensor(values).to(dtype).float()
    trimmer = Magnitude(density, num_elements=len(delta), num_blocks=1, dtype=dtype, rescale=False)
    while trimmer.pending:
        trimmer.measure(0, delta)
        trimmer.advance()
    trimmed = trimmer.apply(0, delta.clone())
    expected = torch.from_numpy(reference.trim(delta.double().numpy(), density, rescale=False))
    assert torch.equal(trimmed.double(), expected)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("rescale", [True, False])
def test_dare_given_its_masks(method: str, rescale: bool) -> None:
    values = tensors(3, (23, 41), torch.float32)
    densities = (0.3, 0.6, 1.0)
    found = merge_tensors(
        method,
        values,
        Settings(weights=WEIGHTS, densities=densities, rescale=rescale, seed=3),
        name="model.norm.weight",
    )
    kept = []
    for k, (delta, density) in enumerate(zip(deltas_of(values), densities, strict=True)):
        mask = np.ones(delta.shape, dtype=bool)
        if density < 1:
            drawn = RandomMask(
                density, seed=3, name="model.norm.weight", model=k, num_blocks=1, rescale=False
            )
            mask = drawn.mask(0, delta.size).numpy().reshape(delta.shape) > 0
        kept.append(reference.drop(delta, mask, rescale=rescale and density < 1))
    expected = reference.task_vectors(
        exact(values)[0], kept, WEIGHTS, elect=method == "dare_ties", normalize=False
    )
    assert_rounded_once(found, expected)


def test_dare_drops_at_random_and_keeps_the_norm() -> None:
    values = tensors(1, (SEVERAL_BLOCKS,), torch.float64)
    density = 0.3
    one = Settings(weights=(1.0,), densities=(density,), rescale=True)
    delta = values[1] - values[0]
    dropped = merge_tensors("dare_linear", values, one) - values[0]
    kept = dropped.abs() > 1e-12
    share = kept.double().mean().item()
    assert abs(share - density) < 5 * (density * (1 - density) / SEVERAL_BLOCKS) ** 0.5
    torch.testing.assert_close(dropped.abs().sum(), delta.abs().sum(), rtol=1e-6, atol=0)
    ratio = (dropped / delta)[kept]
    assert ratio.std() < 1e-6 * ratio.mean()
    assert abs(ratio.mean().item() - 1 / density) < 0.05  # in expectation, DARE's 1 / density


def test_dare_masks_are_independent() -> None:
    def mask(**changes: object) -> Tensor:
        options = {"seed": 1, "name": "a", "model": 0, **changes}
        drawn = RandomMask(0.5, num_blocks=2, rescale=False, **options)  # type: ignore[arg-type]
        return drawn.mask(int(changes.get("model") == 9), 100_000).clone()

    first = mask()
    assert torch.equal(first, mask())
    for other in (mask(seed=2), mask(name="b"), mask(model=1)):
        agreement = (first == other).float().mean().item()
        assert abs(agreement - 0.5) < 0.01
    drawn = RandomMask(0.5, seed=1, name="a", model=0, num_blocks=2, rescale=False)
    agreement = (drawn.mask(0, 100_000).clone() == drawn.mask(1, 100_000)).float().mean().item()
    assert abs(agreement - 0.5) < 0.01


@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties"])
def test_densities_at_the_ends(method: str, density: float) -> None:
    values = tensors(1, (100,), torch.float64)
    merged = merge_tensors(
        method, values, Settings(weights=(1.0,), densities=(density,), rescale=True, normalize=False)
    )
    torch.testing.assert_close(merged, values[1] if density else values[0], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp(dtype: torch.dtype, t: float) -> None:
    values = [tensors(0, (17, 31), dtype, seed=seed)[0] for seed in (1, 2)]
    merged = merge_tensors("slerp", values, Settings(t=t))
    assert_rounded_once(merged, reference.slerp(*exact(values), t))


def test_slerp_of_one_direction_is_a_line() -> None:
    a = tensors(0, (100,), torch.float64)[0]
    for b in (2 * a, -a, torch.zeros_like(a)):
        merged = merge_tensors("slerp", [a, b], Settings(t=0.25))
        torch.testing.assert_close(merged, torch.from_numpy(reference.slerp(a.numpy(), b.numpy(), 0.25)))
    line = merge_tensors("slerp", [a, 2 * a], Settings(t=0.25))
    torch.testing.assert_close(line, 1.25 * a)


def test_slerp_keeps_the_length_of_equally_long_vectors() -> None:
    a, b = (tensors(0, (SEVERAL_BLOCKS,), torch.float32, seed=seed)[0] for seed in (1, 2))
    b *= a.norm() / b.norm()
    merged = merge_tensors("slerp", [a, b], Settings(t=0.5))
    torch.testing.assert_close(merged.norm(), a.norm(), rtol=1e-5, atol=0)
    assert ((a + b) / 2).norm() < 0.8 * a.norm()  # what a mean would do


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "dare_ties", "slerp"])
def test_empty_and_scalar_tensors(method: str) -> None:
    one = Settings(
        weights=(0.5, 0.5) if method == "linear" else (1.0,), densities=(0.5,), normalize=True, t=0.5
    )
    for shape in ((), (0,), (3, 0)):
        values = [torch.zeros(shape), torch.ones(shape)]
        merged = merge_tensors(method, values, one)
        assert merged.shape == values[0].shape
        assert merged.isfinite().all()


def test_weights_that_cancel() -> None:
    values = tensors(1, (5,), torch.float32)
    for weights in ((1.0, -1.0), (0.3, -0.1 - 0.2), (0.0, 0.0), (1e200, -1e200)):
        with pytest.raises(ValueError, match="sum to 0"):
            merge_tensors("linear", values, Settings(weights=weights, normalize=True))
    for weights in ((1e-300, 1e-300), (1.0, -0.999)):  # small or close, but no rounding
        merge_tensors("linear", values, Settings(weights=weights, normalize=True))
    merged = merge_tensors("linear", values, Settings(weights=(1.0, -1.0)))
    torch.testing.assert_close(merged, values[0] - values[1])


def test_differing_tensors_are_refused() -> None:
    with pytest.raises(ValueError, match="shape or type"):
        merge_tensors("linear", [torch.zeros(2), torch.zeros(3)], Settings(weights=(1.0, 1.0)))
