"""Sums and maxima over a batch's tokens, collected on the device, reduced over the branch once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from copd_megatron.objectives.base import MicroBatchRows
from copd_megatron.objectives.surrogate import flatten
from copd_megatron.records import TrainRow
from copd_megatron.topology.collectives import all_gather_messages


@dataclass(frozen=True, kw_only=True)
class BatchStatistics:
    """Sums over a batch's unmasked tokens, and the loss; the same on every rank of the branch."""

    loss: float
    terms: dict[str, float]
    sums: dict[str, float]
    """As in ``objectives.base.LossOutput.statistics``, with the key ``num_tokens``; and ``gen_kl_error``, the
    k3 estimate of KL(rollout engine || trainer) over the ``gen_tokens`` of rows that the batch's version of
    the weights sampled. Once an update has changed these it means nothing."""
    max_gen_logprob_error: float
    """Largest |log-probability under the trainer - under the rollout engine| of one of these tokens."""

    @property
    def gen_kl_error(self) -> float:
        """Mean over ``gen_tokens``."""
        return self.sums.get("gen_kl_error", math.nan) / max(self.sums.get("gen_tokens", 0.0), 1.0)

    def mean(self, name: str) -> float:
        """Mean over unmasked tokens."""
        return self.sums.get(name, math.nan) / max(self.sums.get("num_tokens", 0.0), 1.0)


class Tally:
    """Collects scalars without waiting for the device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._maxima: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor) -> None:
        """Adds to a sum."""
        value = value.detach().double()
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def maximum(self, name: str, value: Tensor) -> None:
        """Raises a maximum."""
        value = value.detach().double()
        self._maxima[name] = torch.maximum(self._maxima[name], value) if name in self._maxima else value

    def reduce(self, *, counts: bool) -> tuple[dict[str, float], dict[str, float]]:
        """(sums, maxima) over the branch's ranks; collective. Only ranks with ``counts`` contribute: one
        per data-parallel replica, as its other ranks hold the same values or none."""
        mine = (_read(self._sums), _read(self._maxima)) if counts else ({}, {})
        parts = all_gather_messages(mine)
        sums: dict[str, float] = {}
        maxima: dict[str, float] = {}
        for part_sums, part_maxima in parts:
            for name, value in part_sums.items():
                sums[name] = sums.get(name, 0.0) + value
            for name, value in part_maxima.items():
                maxima[name] = max(maxima.get(name, -math.inf), value)
        return sums, maxima


def _read(values: dict[str, Tensor]) -> dict[str, float]:
    """One transfer from the device for all of them."""
    if not values:
        return {}
    return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))


def tally_mismatch(
    tally: Tally, batch: MicroBatchRows, rows: Sequence[TrainRow], logprobs: Tensor, version: int
) -> None:
    """How far the trainer's log-probabilities are from the rollout engine's, on one micro-batch.

    Rows that other weights than ``version`` sampled are left out: they differ for another reason.
    """
    known = [row.rollout_logprobs for row in rows]
    if not batch.rows or any(value is None for value in known):
        return
    masks = [row.loss_mask * (row.weight_version == version) for row in rows]
    mask = flatten(batch.rows, masks, logprobs.device) > 0
    rollout = flatten(batch.rows, [value for value in known if value is not None], logprobs.device)
    difference = torch.where(mask, logprobs - rollout, 0.0)
    tally.add("sum/gen_tokens", mask.sum())
    tally.add("sum/gen_kl_error", (torch.expm1(difference) - difference).sum())
    tally.maximum("gen_logprob_error", difference.abs().max())
