"""What every objective needs to make rows: rollouts to rows, and checks of per-token arrays. numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from copd_megatron.records import FloatArray, Rollout, TrainRow

MAX_LOG_RATIO = 20.0
"""Log-ratios are bounded to +-20 before they are exponentiated: exp(20) = 4.9e8 is far beyond any clip range
and far from overflow."""

Float64Array = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


def row_of(rollout: Rollout, component: str, advantages: FloatArray) -> TrainRow:
    """A rollout as a training row with these advantages [R]; every response token counts.

    Raises:
        ValueError: the rollout has not one log-probability for each response token.
    """
    if len(rollout.rollout_logprobs) != rollout.response_length:
        raise ValueError(
            f"{label_of(rollout)}: {len(rollout.rollout_logprobs)} rollout_logprobs for "
            f"{rollout.response_length} response tokens"
        )
    return TrainRow(
        token_ids=rollout.token_ids,
        prompt_length=rollout.prompt_length,
        advantages=advantages,
        loss_mask=np.ones(rollout.response_length, dtype=np.float32),
        component=component,
        rollout_logprobs=rollout.rollout_logprobs,
        weight_version=rollout.weight_version,
        media=rollout.media,
    )


def per_rollout(
    name: str, arrays: Sequence[npt.ArrayLike] | None, rollouts: Sequence[Rollout]
) -> list[FloatArray | None]:
    """One float32 [R] per rollout, checked; or None for each."""
    if arrays is None:
        return [None] * len(rollouts)
    if len(arrays) != len(rollouts):
        raise ValueError(f"{len(arrays)} {name} for {len(rollouts)} rollouts")
    checked: list[FloatArray | None] = []
    for values, rollout in zip(arrays, rollouts, strict=True):
        array = np.asarray(values, dtype=np.float32)
        if array.shape != (rollout.response_length,):
            raise ValueError(
                f"{label_of(rollout)}: {name} has shape {list(array.shape)} for "
                f"{rollout.response_length} response tokens"
            )
        checked.append(array)
    return checked


def label_of(rollout: Rollout) -> str:
    """How error messages name a rollout."""
    return f"rollout {rollout.prompt.prompt_id} #{rollout.sample_index}"


def finite_vector(name: str, values: npt.ArrayLike) -> Float64Array:
    """``values`` as a float64 vector. Raises ValueError, naming ``name``, unless all are finite."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional, got shape {list(array.shape)}")
    bad = np.flatnonzero(~np.isfinite(array))
    if len(bad):
        raise ValueError(
            f"{name}: {len(bad)} of {len(array)} values are not finite, the first is {array[bad[0]]} at "
            f"index {bad[0]}; look for diverged weights or for masked logits in what computed them"
        )
    return array


def mask_of(mask: npt.ArrayLike) -> BoolArray:
    """A loss mask as booleans. Raises ValueError where it holds anything but 0 and 1."""
    array = np.asarray(mask)
    if array.ndim != 1 or not np.all((array == 0) | (array == 1)):
        raise ValueError(f"a loss mask must be one-dimensional and hold 0 or 1 only, got {array}")
    return array.astype(bool)


def masked_log_ratio(
    name_a: str, logprobs_a: npt.ArrayLike, name_b: str, logprobs_b: npt.ArrayLike, keep: BoolArray
) -> Float64Array:
    """log p_a - log p_b, [R], 0 where masked."""
    sides = []
    for name, values in ((name_a, logprobs_a), (name_b, logprobs_b)):
        array = np.asarray(values, dtype=np.float64)
        check_same_length(name, array, "loss_mask", keep)
        sides.append(finite_vector(name, np.where(keep, array, 0.0)))
    return sides[0] - sides[1]


def check_same_length(name_a: str, a: npt.NDArray[Any], name_b: str, b: npt.NDArray[Any]) -> None:
    """Raises ValueError, naming both, where the shapes differ."""
    if a.shape != b.shape:
        raise ValueError(f"{name_a} has shape {list(a.shape)}, {name_b} {list(b.shape)}: they must agree")
