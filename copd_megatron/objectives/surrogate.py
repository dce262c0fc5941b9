"""The clipped surrogate (Eq. 7) as a token loss: rows in, streams laid out, ``policy_loss`` called.

Shape legend: ``R`` response tokens of a row, ``N`` response tokens of a micro-batch, flattened.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from copd_megatron.config.schema import LossConfig, MismatchCorrection
from copd_megatron.objectives.base import LossOutput, MicroBatchRows, PreparedLoss
from copd_megatron.objectives.denominators import component_counts, row_weights
from copd_megatron.objectives.mismatch import mismatch_correction
from copd_megatron.objectives.policy_loss import TokenStreams, policy_loss
from copd_megatron.records import FloatArray, TrainRow


@dataclass(frozen=True)
class ClippedSurrogate:
    """Eq. 7 with the options of ``LossConfig``, over rows of any number of components.

    Every component is normalised by its own counts over all rows of the update. Rows without
    ``old_logprobs`` take them from the forward pass that the loss is computed in (ratio 1, on-policy).
    """

    config: LossConfig
    max_new_tokens: int
    """Divisor of ``aggregation=constant`` where ``constant_divisor`` is null."""

    def prepare(self, rows: Sequence[TrainRow]) -> PreparedLoss:
        """Settles denominators and mismatch corrections."""
        weights = row_weights(rows, component_counts(rows), self.config, self.max_new_tokens)
        correction = corrections(rows, self.config)

        def loss_of(batch: MicroBatchRows, logprobs: Tensor, entropy: Tensor) -> LossOutput:
            streams = token_streams(batch, rows, weights, correction, logprobs, self.config)
            return policy_loss(logprobs, entropy, streams, self.config)

        return loss_of


def corrections(rows: Sequence[TrainRow], loss: LossConfig) -> list[FloatArray] | None:
    """Rollout/trainer mismatch factors [R] per row, or None where the correction is off."""
    if loss.mismatch_correction is MismatchCorrection.none:
        return None
    factors = []
    for row in rows:
        if row.old_logprobs is None or row.rollout_logprobs is None:
            raise ValueError(
                f"loss.mismatch_correction={loss.mismatch_correction.value} needs old and rollout "
                f"log-probabilities on every row, a {row.component} row lacks them"
            )
        factors.append(mismatch_correction(row.old_logprobs, row.rollout_logprobs, row.loss_mask, loss))
    return factors


def token_streams(
    batch: MicroBatchRows,
    rows: Sequence[TrainRow],
    weights: Sequence[FloatArray],
    correction: Sequence[FloatArray] | None,
    logprobs: Tensor,
    loss: LossConfig,
) -> TokenStreams:
    """The rows' streams of one micro-batch, flattened, where ``logprobs`` are."""

    def flat(values: Sequence[np.ndarray]) -> Tensor:
        return flatten(batch.rows, values, logprobs.device)

    now = logprobs.detach()
    old = _known_or(batch, [row.old_logprobs for row in rows], now)
    # without a reference a row has no KL term: against itself it is zero, and so is its gradient
    references = [row.reference_logprobs for row in rows]
    has_reference = bool(loss.kl_coefficient) or any(value is not None for value in references)
    return TokenStreams(
        old_logprobs=old,
        advantages=flat([row.advantages for row in rows]),
        weights=flat(weights),
        loss_mask=flat([row.loss_mask for row in rows]),
        row_index=batch.row_index_n,
        num_rows=max(len(batch.rows), 1),
        reference_logprobs=_known_or(batch, references, now) if has_reference else None,
        correction=None if correction is None else flat(correction),
    )


def _known_or(batch: MicroBatchRows, values: Sequence[FloatArray | None], default: Tensor) -> Tensor:
    """[N] the rows' given values, and ``default`` on the tokens of rows that have none."""
    known = torch.tensor([values[row] is not None for row in batch.rows], dtype=torch.bool)
    if not known.any():
        return default
    lengths = torch.bincount(batch.row_index_n.cpu(), minlength=len(batch.rows)).tolist()
    arrays = [
        value if (value := values[row]) is not None else np.zeros(length, dtype=np.float32)
        for row, length in zip(batch.rows, lengths, strict=True)
    ]
    given = flatten(range(len(arrays)), arrays, default.device)
    return torch.where(known.to(default.device)[batch.row_index_n], given, default)


def flatten(rows: Sequence[int], values: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """Per-row arrays [R] of the named rows, concatenated to [N] float32 on the device."""
    parts = [np.asarray(values[row], dtype=np.float32) for row in rows]
    flat = np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)
    return torch.from_numpy(flat).to(device)
