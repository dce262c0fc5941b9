"""Rows of a micro-batch as the flat streams that the loss takes, and what is counted along the way."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from copd_megatron.config.schema import LossConfig, MismatchCorrection
from copd_megatron.objectives.mismatch import mismatch_correction
from copd_megatron.objectives.policy_loss import TokenStreams
from copd_megatron.policy.batch.micro_batch import MicroBatch, flatten
from copd_megatron.policy.batch.statistics import Tally
from copd_megatron.records import FloatArray, TrainRow


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
    batch: MicroBatch,
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


def _known_or(batch: MicroBatch, values: Sequence[FloatArray | None], default: Tensor) -> Tensor:
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


def tally_mismatch(tally: Tally, batch: MicroBatch, rows: Sequence[TrainRow], logprobs: Tensor) -> None:
    """How far the trainer's log-probabilities are from the rollout engine's, on one micro-batch."""
    known = [row.rollout_logprobs for row in rows]
    if not batch.rows or any(value is None for value in known):
        return
    mask = flatten(batch.rows, [row.loss_mask for row in rows], logprobs.device) > 0
    rollout = flatten(batch.rows, [value for value in known if value is not None], logprobs.device)
    difference = torch.where(mask, logprobs - rollout, 0.0)
    tally.add("sum/gen_kl_error", (torch.expm1(difference) - difference).sum())
    tally.maximum("gen_logprob_error", difference.abs().max())
