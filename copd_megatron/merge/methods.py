"""The merge methods: pure arithmetic on blocks of tensors, no files, no processes.

The definitions are mergekit's (0.1.5), so a recipe means the same here as there. With theta_k the models,
theta_b the base, and delta_k = theta_k - theta_b:

``linear``            sum_k w_k theta_k, divided by sum_k w_k when ``normalize`` (default)
``task_arithmetic``   theta_b + lambda * sum_k w_k delta_k  (arXiv 2212.04089)
``ties``              delta_k trimmed to its ``density`` largest magnitudes; per element, only those
                      w_k delta_k count whose sign is that of sum_k w_k delta_k (zero counts as positive),
                      and their sum is divided by the sum of their w_k (``normalize``)  (arXiv 2306.01708)
``dare_linear``       delta_k dropped at random to ``density``, rescaled to its old L1 norm, then as task
                      arithmetic  (arXiv 2311.03099)
``dare_ties``         the same dropping, then the sign election of ``ties`` without ``normalize``
``slerp``             along the great circle between base and model, by the fraction ``t``; a straight line
                      where they are nearly parallel (|cos| > 0.9995)
``passthrough``       one model, as it is: bit for bit, unless the result has another type

Precision. Sixteen-bit (and narrower) tensors are merged in float32, so each element is rounded once, to the
result's type; mergekit computes the task-vector methods in the tensors' own type and rounds at every step.
float32 tensors are merged in float32, means in float64; float64 in float64. Norms and dot products are
summed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from copd_megatron.hf.tensors import TensorSpec, block_range
from copd_megatron.merge.scratch import scratch
from copd_megatron.merge.sparsify import Keep, Magnitude, RandomMask, Sparsifier

_LEAST_SUM = 1e-12
"""Of weights, beside the sum of their magnitudes."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A method's parameters for one tensor, all patterns and defaults resolved."""

    weights: tuple[float, ...] = ()
    """One per model; base left out."""
    densities: tuple[float, ...] = ()
    """Share of each task vector that is kept, 0 .. 1; empty: all of it."""
    normalize: bool = False
    rescale: bool = False
    scale: float = 1.0
    """mergekit's ``lambda``."""
    t: float = 0.0
    """slerp: 0 gives the base, 1 the other model."""
    seed: int = 0
    """dare: root of the random masks."""
    arithmetic: torch.dtype | None = None
    """Type to compute in; None: as the module says."""


class TensorMerge(Protocol):
    """One tensor's merge: passes of ``measure`` over all blocks, each ended by ``advance``, while
    ``pending``; then ``combine`` for every block. ``values`` are the inputs' blocks (1-D, all of one type):
    the base first where the method has one, then the models."""

    @property
    def pending(self) -> bool: ...

    def measure(self, block: int, values: Sequence[Tensor]) -> None: ...

    def advance(self) -> None: ...

    def combine(self, block: int, values: Sequence[Tensor]) -> Tensor:
        """The merged block, in the type of the arithmetic; in scratch memory (see ``scratch``) or an input's,
        so to be copied before the next."""
        ...


class Copy:
    """One model's values."""

    pending = False

    def __init__(self, spec: TensorSpec, settings: Settings) -> None:
        """There is nothing to set."""

    def measure(self, block: int, values: Sequence[Tensor]) -> None:
        raise AssertionError("nothing to measure")

    def advance(self) -> None:
        raise AssertionError("nothing to measure")

    def combine(self, block: int, values: Sequence[Tensor]) -> Tensor:
        return values[0]


class Linear:
    """Weighted sum or mean."""

    pending = False

    def __init__(self, spec: TensorSpec, settings: Settings) -> None:
        total = sum(settings.weights) if settings.normalize else 1.0
        if not math.isfinite(total):
            raise ValueError(
                f"merge: the weights of {spec.name} sum to more than a number can be; change them"
            )
        # 0.1 + 0.2 - 0.3 is no 0: what is left of weights that cancel is rounding.
        if settings.normalize and abs(total) <= _LEAST_SUM * sum(map(abs, settings.weights)):
            raise ValueError(
                f"merge: the weights of {spec.name} sum to 0, so their mean does not exist; "
                "change them or set normalize: false"
            )
        self._weights = [weight / total for weight in settings.weights]
        wide = torch.float64 if spec.dtype in (torch.float32, torch.float64) else torch.float32
        self._type = settings.arithmetic or wide

    def measure(self, block: int, values: Sequence[Tensor]) -> None:
        raise AssertionError("nothing to measure")

    def advance(self) -> None:
        raise AssertionError("nothing to measure")

    def combine(self, block: int, values: Sequence[Tensor]) -> Tensor:
        total = scratch.cast("total", values[0], self._type).mul_(self._weights[0])
        for value, weight in zip(values[1:], self._weights[1:], strict=True):
            total.add_(scratch.cast("model", value, self._type), alpha=weight)
        return total


class TaskVectors:
    """theta_b + lambda * combination of sparsified, weighted task vectors.

    Args:
        elect_signs: only contributions of the majority's sign count (TIES).
        sparsifier: makes the one for model ``k``.
    """

    def __init__(
        self,
        spec: TensorSpec,
        settings: Settings,
        *,
        elect_signs: bool,
        sparsifier: Callable[[int], Sparsifier],
    ) -> None:
        if not math.isfinite(sum(settings.weights)):
            raise ValueError(
                f"merge: the weights of {spec.name} sum to more than a number can be; change them"
            )
        self._settings, self._elect_signs = settings, elect_signs
        self._type = settings.arithmetic or _float_type(spec.dtype)
        self._sparsifiers = [sparsifier(k) for k in range(len(settings.weights))]

    @property
    def pending(self) -> bool:
        return any(sparsifier.pending for sparsifier in self._sparsifiers)

    def _delta(self, k: int, values: Sequence[Tensor], base: Tensor) -> Tensor:
        return scratch.cast(f"delta{k}", values[k + 1], self._type).sub_(base)

    def measure(self, block: int, values: Sequence[Tensor]) -> None:
        base = scratch.cast("base", values[0], self._type)
        for k, sparsifier in enumerate(self._sparsifiers):
            if sparsifier.pending:
                sparsifier.measure(block, self._delta(k, values, base))

    def advance(self) -> None:
        for sparsifier in self._sparsifiers:
            if sparsifier.pending:
                sparsifier.advance()

    def combine(self, block: int, values: Sequence[Tensor]) -> Tensor:
        settings = self._settings
        base = scratch.cast("base", values[0], self._type)
        deltas = [
            sparsifier.apply(block, self._delta(k, values, base)).mul_(settings.weights[k])
            for k, sparsifier in enumerate(self._sparsifiers)
        ]
        if self._elect_signs:
            mixed = _elected_sum(deltas, settings.weights, normalize=settings.normalize)
        else:
            mixed = deltas[0]
            for delta in deltas[1:]:
                mixed.add_(delta)
            total = sum(settings.weights)
            if settings.normalize and abs(total) >= 1e-8:
                mixed.div_(total)
        if settings.scale != 1:
            mixed.mul_(settings.scale)
        return mixed.add_(base)


def _elected_sum(deltas: list[Tensor], weights: Sequence[float], *, normalize: bool) -> Tensor:
    """Per element, the sum of the contributions whose sign is that of the sum of all; divided, when
    ``normalize``, by the sum of their weights. ``deltas`` are weighted already, and are overwritten."""
    length, dtype = deltas[0].numel(), deltas[0].dtype
    mixed = scratch.cast("mixed", deltas[0], dtype)
    for delta in deltas[1:]:
        mixed.add_(delta)
    # Turned so that the majority is positive everywhere, what agrees is what is above zero.
    turn = scratch.cast("turn", mixed, dtype).ge_(0).mul_(2).sub_(1)
    mixed.zero_()
    divisor = scratch.get("divisor", length, dtype).zero_()
    for delta, weight in zip(deltas, weights, strict=True):
        mixed.add_(delta.mul_(turn).clamp_(min=0))
        if normalize:
            divisor.add_(delta.gt_(0), alpha=weight)
    if normalize:
        # What nobody contributes to is 0 / 1, as is what contributors of cancelling weights do.
        unfilled = torch.eq(divisor, 0, out=deltas[0])
        mixed.div_(divisor.add_(unfilled))
    return mixed.mul_(turn)


class Slerp:
    """Spherical interpolation between the base (t = 0) and one model (t = 1), each tensor as one vector."""

    def __init__(self, spec: TensorSpec, settings: Settings) -> None:
        self._t = settings.t
        self._type = settings.arithmetic or _float_type(spec.dtype)
        self._sums = np.zeros((spec.num_blocks, 3))
        self._factors = (1.0 - self._t, self._t)
        self.pending = True

    def measure(self, block: int, values: Sequence[Tensor]) -> None:
        a = scratch.cast("first", values[0], torch.float64)
        b = scratch.cast("second", values[1], torch.float64)
        self._sums[block] = [(a @ a).item(), (b @ b).item(), (a @ b).item()]

    def advance(self) -> None:
        squares_a, squares_b, product = (float(x) for x in self._sums.sum(axis=0))
        # A vector of (almost) no length is not normalised.
        norms = [math.sqrt(x) if math.sqrt(x) > 1e-8 else 1.0 for x in (squares_a, squares_b)]
        cosine = max(-1.0, min(1.0, product / (norms[0] * norms[1])))
        if abs(cosine) <= 0.9995:
            angle = math.acos(cosine)
            self._factors = (
                math.sin((1 - self._t) * angle) / math.sin(angle),
                math.sin(self._t * angle) / math.sin(angle),
            )
        self.pending = False

    def combine(self, block: int, values: Sequence[Tensor]) -> Tensor:
        result = scratch.cast("total", values[0], self._type).mul_(self._factors[0])
        return result.add_(scratch.cast("model", values[1], self._type), alpha=self._factors[1])


def _float_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _task_arithmetic(spec: TensorSpec, settings: Settings) -> TensorMerge:
    return TaskVectors(spec, settings, elect_signs=False, sparsifier=lambda k: Keep())


def _ties(spec: TensorSpec, settings: Settings) -> TensorMerge:
    def sparsifier(k: int) -> Sparsifier:
        density = settings.densities[k] if settings.densities else 1.0
        if density >= 1:
            return Keep()
        return Magnitude(
            density,
            num_elements=spec.num_elements,
            num_blocks=spec.num_blocks,
            dtype=spec.dtype,
            rescale=settings.rescale,
        )

    return TaskVectors(spec, settings, elect_signs=True, sparsifier=sparsifier)


def _dare(spec: TensorSpec, settings: Settings, *, elect_signs: bool) -> TensorMerge:
    def sparsifier(k: int) -> Sparsifier:
        density = settings.densities[k] if settings.densities else 1.0
        if density >= 1:
            return Keep()
        return RandomMask(
            density,
            seed=settings.seed,
            name=spec.name,
            model=k,
            num_blocks=spec.num_blocks,
            rescale=settings.rescale,
        )

    return TaskVectors(spec, settings, elect_signs=elect_signs, sparsifier=sparsifier)


def start(method: str, spec: TensorSpec, settings: Settings) -> TensorMerge:
    """The merge of one tensor by ``method``; ``spec.dtype`` is the type that the inputs are given in.

    Raises:
        ValueError: the settings cannot be (weights that sum to 0 and shall be normalised).
        KeyError: no such method.
    """
    makers: dict[str, Callable[[TensorSpec, Settings], TensorMerge]] = {
        "linear": Linear,
        "task_arithmetic": _task_arithmetic,
        "ties": _ties,
        "dare_linear": lambda s, p: _dare(s, p, elect_signs=False),
        "dare_ties": lambda s, p: _dare(s, p, elect_signs=True),
        "slerp": Slerp,
        "passthrough": Copy,
    }
    return makers[method](spec, settings)


def merge_tensors(method: str, values: Sequence[Tensor], settings: Settings, *, name: str = "") -> Tensor:
    """Merges tensors in memory: the same arithmetic that the engine runs between files.

    Args:
        values: the base first where the method has one (all but ``linear``), then the models; one shape and
            type. For ``slerp``, base and one model.
        name: part of what determines DARE's masks.

    Returns:
        The merged tensor, in the inputs' type.

    Raises:
        ValueError: shapes or types differ.
    """
    first = values[0]
    if any(value.shape != first.shape or value.dtype != first.dtype for value in values):
        raise ValueError(f"merge: {name} differs in shape or type: {[(v.shape, v.dtype) for v in values]}")
    spec = TensorSpec(name, tuple(first.shape), first.dtype)
    flat = [value.contiguous().flatten() for value in values]

    def block_of(block: int) -> list[Tensor]:
        begin, end = block_range(spec, block)
        return [value[begin:end] for value in flat]

    merge = start(method, spec, settings)
    while merge.pending:
        for block in range(spec.num_blocks):
            merge.measure(block, block_of(block))
        merge.advance()
    result = torch.empty_like(flat[0])
    for block in range(spec.num_blocks):
        begin, end = block_range(spec, block)
        result[begin:end] = merge.combine(block, block_of(block))
    return result.view(first.shape)
