"""Which elements of a task vector are kept: by magnitude (TIES) or at random (DARE), decided block by block.

Both need the whole tensor before they can decide on the first element (which magnitude is the k-th largest;
how much norm is lost), yet neither keeps it: they go over it in passes, and remember a histogram, the
elements that equal the threshold, or one sum per block.
"""

from __future__ import annotations

import hashlib
import threading
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from copd_megatron.merge.scratch import scratch

_HIGH_BINS = 1 << 16
_LOW_BITS = 15


class Sparsifier(Protocol):
    """Passes over one task vector: ``measure`` every block, then ``advance``, while ``pending``."""

    @property
    def pending(self) -> bool:
        """Another pass is needed before ``apply``."""

    def measure(self, block: int, delta: Tensor) -> None:
        """Looks at a block. Called once per block and pass, by any thread, in any order."""

    def advance(self) -> None:
        """Ends a pass."""

    def apply(self, block: int, delta: Tensor) -> Tensor:
        """Makes the dropped elements of the block zero, in place, and rescales if so configured."""


class Keep:
    """Keeps all: density 1."""

    pending = False

    def measure(self, block: int, delta: Tensor) -> None:
        raise AssertionError("nothing to measure")

    def advance(self) -> None:
        raise AssertionError("nothing to measure")

    def apply(self, block: int, delta: Tensor) -> Tensor:
        return delta


class _Rescaling:
    """Scales what is kept so that its L1 norm is that of the whole task vector (mergekit's ``rescale``)."""

    def __init__(self, num_blocks: int) -> None:
        self._before = np.zeros(num_blocks)
        self._after = np.zeros(num_blocks)

    def measure(self, block: int, delta: Tensor, mask: Tensor) -> None:
        """Takes note of a block; overwrites ``delta``."""
        self._before[block] = delta.abs_().sum().item()
        self._after[block] = delta.mul_(mask).sum().item()

    def factor(self) -> float:
        before, after = float(self._before.sum()), float(self._after.sum())
        return 1.0 if before < 1e-7 or after < 1e-7 else before / after


class RandomMask:
    """Keeps each element with probability ``density`` (DARE).

    A block's mask depends on (seed, tensor name, model index, block) alone, hence neither on threads,
    processes nor shards. (mergekit draws from torch's global generator, in the order in which it happens to
    visit tensors.)
    """

    def __init__(
        self, density: float, *, seed: int, name: str, model: int, num_blocks: int, rescale: bool
    ) -> None:
        self._density = density
        self._key = f"{seed}\0{name}\0{model}\0"
        self._rescaling = _Rescaling(num_blocks) if rescale else None
        self._factor = 1.0
        self.pending = rescale

    def mask(self, block: int, num_elements: int) -> Tensor:
        """1.0 where an element is kept, 0.0 elsewhere; float32 [num_elements], in scratch memory."""
        seed = int.from_bytes(
            hashlib.blake2b(f"{self._key}{block}".encode(), digest_size=16).digest(), "little"
        )
        mask = scratch.get("mask", num_elements, torch.float32)
        np.random.Generator(np.random.SFC64(seed)).random(out=mask.numpy(), dtype=np.float32)
        return mask.lt_(self._density)

    def measure(self, block: int, delta: Tensor) -> None:
        assert self._rescaling is not None
        self._rescaling.measure(block, delta, self.mask(block, delta.numel()))

    def advance(self) -> None:
        assert self._rescaling is not None
        self._factor = self._rescaling.factor()
        self.pending = False

    def apply(self, block: int, delta: Tensor) -> Tensor:
        delta.mul_(self.mask(block, delta.numel()))
        return delta.mul_(self._factor) if self._factor != 1.0 else delta


class _Histograms:
    """Histograms that are reused (see ``scratch``): a model has hundreds of small tensors."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def take(self) -> Tensor:
        """All zero; int64 [65536]."""
        try:
            return self._free.pop().zero_()
        except IndexError:
            return torch.zeros(_HIGH_BINS, dtype=torch.int64)

    def give_back(self, histogram: Tensor) -> None:
        self._free.append(histogram)


_HISTOGRAMS = _Histograms()


class Magnitude:
    """Keeps the ``max(1, int(density * n))`` elements of largest magnitude (TIES' trimming).

    Exact, without sorting: the bit patterns of non-negative floats order as the floats do, so a histogram of
    the upper 16 bits finds the bin of the k-th largest, and a second pass over that bin its exact value.
    Magnitudes are compared in ``dtype`` (rounded to it, then as float32), as mergekit does; of elements that
    equal the k-th largest, those with the lowest indices are kept (mergekit's choice among them is that of
    an unstable sort).
    """

    def __init__(
        self, density: float, *, num_elements: int, num_blocks: int, dtype: torch.dtype, rescale: bool
    ) -> None:
        self._dtype = dtype
        self._kept = max(1, int(density * num_elements)) if density > 0 and num_elements else 0
        self._stage = "high" if self._kept else "done"
        self._histogram = _HISTOGRAMS.take() if self._kept else None
        self._lock = threading.Lock()
        self._high = self._above = 0
        self._threshold = 0.0
        self._lows: list[tuple[Tensor, Tensor] | None] = [None] * num_blocks
        self._ties = [0] * num_blocks
        self._quota = [0] * num_blocks
        self._rescaling = _Rescaling(num_blocks) if rescale and self._kept else None
        self._factor = 1.0

    @property
    def pending(self) -> bool:
        return self._stage != "done"

    def _magnitudes(self, delta: Tensor) -> Tensor:
        """What elements are ranked by; float32, in scratch memory."""
        if self._dtype not in (torch.float32, torch.float64):
            delta = scratch.cast("rounded", delta, self._dtype)
        return scratch.cast("magnitude", delta, torch.float32).abs_()

    def measure(self, block: int, delta: Tensor) -> None:
        if self._stage == "norm":
            assert self._rescaling is not None
            self._rescaling.measure(block, delta, self._mask(block, delta))
            return
        magnitudes = self._magnitudes(delta)
        if self._stage == "low" and self._dtype == torch.bfloat16:
            # All of bfloat16's bits are among the upper ones: the bin is the value.
            value = _float_of(self._high << _LOW_BITS)
            count = int(magnitudes.eq_(value).sum().item())
            self._lows[block] = torch.tensor([0]), torch.tensor([count])
            return
        bits = magnitudes.view(torch.int32)
        high = scratch.get("high", bits.numel(), torch.int32)
        torch.bitwise_right_shift(bits, _LOW_BITS, out=high)
        if self._stage == "high":
            counts = torch.bincount(high, minlength=_HIGH_BINS)
            assert self._histogram is not None
            with self._lock:
                self._histogram += counts
        else:
            low = bits[high == self._high] & ((1 << _LOW_BITS) - 1)
            counts = torch.bincount(low, minlength=1 << _LOW_BITS)
            values = counts.nonzero().flatten()
            self._lows[block] = values, counts[values]

    def advance(self) -> None:
        if self._stage == "high":
            assert self._histogram is not None
            self._high, self._above = _kth_bin(self._histogram, self._kept)
            _HISTOGRAMS.give_back(self._histogram)
            self._histogram = None
            self._stage = "low"
        elif self._stage == "low":
            self._find_threshold()
            self._stage = "norm" if self._rescaling else "done"
        else:
            assert self._rescaling is not None
            self._factor = self._rescaling.factor()
            self._stage = "done"

    def _find_threshold(self) -> None:
        """The exact k-th largest, and how many of those equal to it each block keeps."""
        counts = _HISTOGRAMS.take()
        for found in self._lows:
            if found is not None:
                counts[found[0]] += found[1]
        low, above = _kth_bin(counts, self._kept - self._above)
        _HISTOGRAMS.give_back(counts)
        self._threshold = _float_of((self._high << _LOW_BITS) | low)
        left = self._kept - self._above - above
        for block, found in enumerate(self._lows):
            self._ties[block] = int(found[1][found[0] == low].sum()) if found is not None else 0
            self._quota[block] = min(self._ties[block], left)
            left -= self._quota[block]
        self._lows = []

    def _mask(self, block: int, delta: Tensor) -> Tensor:
        """1.0 where an element is kept, 0.0 elsewhere; float32, in scratch memory."""
        magnitudes = self._magnitudes(delta)
        quota, ties = self._quota[block], self._ties[block]
        if quota == ties:
            return magnitudes.ge_(self._threshold)
        if quota == 0:
            return magnitudes.gt_(self._threshold)
        tied = (magnitudes == self._threshold).nonzero().flatten()[:quota]
        keep = magnitudes.gt_(self._threshold)
        keep[tied] = 1.0
        return keep

    def apply(self, block: int, delta: Tensor) -> Tensor:
        if not self._kept:
            return delta.zero_()
        delta.mul_(self._mask(block, delta))
        return delta.mul_(self._factor) if self._factor != 1.0 else delta


def _float_of(bits: int) -> float:
    return torch.tensor([bits], dtype=torch.int32).view(torch.float32).item()


def _kth_bin(counts: Tensor, k: int) -> tuple[int, int]:
    """The bin of the k-th largest (k >= 1), and how many lie in the bins above it."""
    from_top = counts.flip(0).cumsum(0)
    reached = int((from_top >= k).nonzero()[0])
    above = int(from_top[reached - 1]) if reached else 0
    return len(counts) - 1 - reached, above
