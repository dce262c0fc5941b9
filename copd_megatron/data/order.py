"""The order of an epoch: samples sorted by 64 random bits each, drawn from PCG64 seeded with (seed, epoch).

The raw bit stream of that generator is fixed by numpy's compatibility policy, unlike ``permutation``.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


def epoch_order(num_samples: int, seed: int, epoch: int, shuffle: bool = True) -> Indices:
    """[num_samples] sample indices in the order of this epoch."""
    if not shuffle:
        return np.arange(num_samples, dtype=np.int64)
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(num_samples)
    return np.argsort(np.asarray(bits, dtype=np.uint64), kind="stable").astype(np.int64)
