"""The merge methods once more: slow, whole tensors, float64, element by element from the definitions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def linear(models: Sequence[Array], weights: Sequence[float], *, normalize: bool) -> Array:
    total = sum(w * m for w, m in zip(weights, models, strict=True))
    return total / sum(weights) if normalize else total  # type: ignore[return-value]


def trim(delta: Array, density: float, *, rescale: bool) -> Array:
    """The largest magnitudes; of equal ones, those that come first."""
    if density >= 1:
        return delta
    flat = delta.reshape(-1)
    count = max(1, int(density * flat.size)) if density > 0 else 0
    ranked = sorted(range(flat.size), key=lambda i: (-abs(flat[i]), i))
    kept = np.zeros_like(flat)
    for i in ranked[:count]:
        kept[i] = flat[i]
    return _rescaled(flat, kept, rescale).reshape(delta.shape)


def drop(delta: Array, mask: npt.NDArray[np.bool_], *, rescale: bool) -> Array:
    return _rescaled(delta, np.where(mask, delta, 0.0), rescale)


def _rescaled(before: Array, after: Array, rescale: bool) -> Array:
    norms = np.abs(before).sum(), np.abs(after).sum()
    return after * (norms[0] / norms[1]) if rescale and min(norms) >= 1e-7 else after


def task_vectors(
    base: Array,
    deltas: Sequence[Array],
    weights: Sequence[float],
    *,
    elect: bool,
    normalize: bool,
    scale: float = 1.0,
) -> Array:
    """Combines deltas that are sparsified already."""
    merged = np.empty(base.size)
    for i in range(base.size):
        terms = [w * d.reshape(-1)[i] for w, d in zip(weights, deltas, strict=True)]
        counted = list(range(len(terms)))
        if elect:
            sign = 1.0 if sum(terms) >= 0 else -1.0
            counted = [k for k in counted if np.sign(terms[k]) == sign]
        divisor = 1.0
        if normalize:
            divisor = sum(weights[k] for k in counted)
            divisor = 1.0 if abs(divisor) < 1e-8 else divisor
        merged[i] = base.reshape(-1)[i] + scale * sum(terms[k] for k in counted) / divisor
    return merged.reshape(base.shape)


def slerp(a: Array, b: Array, t: float) -> Array:
    norms = [float(np.linalg.norm(v)) for v in (a, b)]
    unit = [v / (n if n > 1e-8 else 1.0) for v, n in zip((a, b), norms, strict=True)]
    cosine = float(np.clip((unit[0] * unit[1]).sum(), -1, 1))
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def distances(base: dict[str, Array], branch: dict[str, Array], other: dict[str, Array]) -> dict[str, Any]:
    """Movement of two branches and the cosine between them, over the tensors given."""
    first = np.concatenate([(branch[n] - base[n]).reshape(-1) for n in base])
    second = np.concatenate([(other[n] - base[n]).reshape(-1) for n in base])
    size = np.linalg.norm(np.concatenate([b.reshape(-1) for b in base.values()]))
    return {
        "moved": (np.linalg.norm(first) / size, np.linalg.norm(second) / size),
        "cosine": float(first @ second / (np.linalg.norm(first) * np.linalg.norm(second))),
    }
