"""How alike two policies behave on the same states: top-k overlap (Eq. 6) and symmetric KL.

Pure tensor functions; choosing the states and computing the distributions is the callers' business.

Shape legend: ``S`` states (positions at which a next token is predicted), ``V`` vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def topk_overlap(topk_a: Tensor, topk_b: Tensor) -> Tensor:
    """Share of the k likeliest next tokens that two policies have in common (Eq. 6), per state.

    Args:
        topk_a: [S, k] token ids of one policy's k likeliest tokens, distinct within a state, in any order.
        topk_b: [S, k] likewise of the other policy.

    Returns:
        [S] float32, |intersection| / k in [0, 1].

    Raises:
        ValueError: shapes differ, are not [S, k], or k is 0.
    """
    if topk_a.ndim != 2 or topk_a.shape != topk_b.shape or topk_a.shape[1] == 0:
        raise ValueError(
            f"top-k ids have shapes {list(topk_a.shape)} and {list(topk_b.shape)}: "
            "both must be [S, k] with the same states and the same k >= 1"
        )
    shared = (topk_a.unsqueeze(2) == topk_b.unsqueeze(1)).any(dim=2)
    return shared.sum(dim=1, dtype=torch.float32) / topk_a.shape[1]


def kl_divergence(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(p || q) = sum_v p(v) (log p(v) - log q(v)), per state, in nats.

    A token with p = 0 (log-probability -inf) adds nothing, whatever q is. Where p > 0 and q = 0 the
    divergence is infinite, and so is the result; it is never NaN for normalised inputs.

    Args:
        logp: [S, V] log-probabilities, normalised over V.
        logq: [S, V] likewise.

    Returns:
        [S], in at least float32.

    Raises:
        ValueError: shapes differ or are not [S, V].
    """
    logp, logq = _as_float(logp, logq)
    return _weighted_log_ratio(logp.exp(), logp, logq).sum(dim=1)


def symmetric_kl(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(p || q) + KL(q || p), per state, in nats: the sum of both directions, not halved.

    Handles -inf as ``kl_divergence`` does: tokens impossible under both policies add nothing, tokens
    impossible under just one make the result infinite.

    Args:
        logp: [S, V] log-probabilities, normalised over V.
        logq: [S, V] likewise.

    Returns:
        [S], in at least float32.

    Raises:
        ValueError: shapes differ or are not [S, V].
    """
    logp, logq = _as_float(logp, logq)
    # Both directions at once: sum_v (p - q)(log p - log q). Each term is >= 0, so nothing cancels.
    return _weighted_log_ratio(logp.exp() - logq.exp(), logp, logq).sum(dim=1)


def _weighted_log_ratio(weight: Tensor, logp: Tensor, logq: Tensor) -> Tensor:
    """weight * (logp - logq), [S, V], with 0 * anything = 0."""
    return torch.where(weight == 0, 0.0, weight * (logp - logq))


def _as_float(logp: Tensor, logq: Tensor) -> tuple[Tensor, Tensor]:
    if logp.ndim != 2 or logp.shape != logq.shape:
        raise ValueError(
            f"log-probabilities have shapes {list(logp.shape)} and {list(logq.shape)}: both must be [S, V]"
        )
    dtype = torch.promote_types(torch.promote_types(logp.dtype, logq.dtype), torch.float32)
    return logp.to(dtype), logq.to(dtype)
