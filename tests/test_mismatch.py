"""``objectives.mismatch`` against the formulas, token by token."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest

from copd_megatron.config.schema import LossConfig, MismatchCorrection
from copd_megatron.objectives.mismatch import mismatch_correction


def slow_correction(old: list, rollout: list, mask: list, config: LossConfig) -> list[float]:
    kind, (low, high) = config.mismatch_correction, config.mismatch_bounds
    product = 1.0
    for o, r, m in zip(old, rollout, mask, strict=True):
        if m:
            product *= math.exp(o) / math.exp(r)
    result = []
    for o, r, m in zip(old, rollout, mask, strict=True):
        rho = math.exp(o) / math.exp(r)
        if not m or kind is MismatchCorrection.none:
            result.append(1.0)
        elif kind is MismatchCorrection.tis_token:
            result.append(min(rho, config.mismatch_cap))
        elif kind is MismatchCorrection.tis_sequence:
            result.append(min(product, config.mismatch_cap))
        elif kind is MismatchCorrection.icepop:
            result.append(rho if low <= rho <= high else 0.0)
        else:
            result.append(1.0 if low <= product <= high else 0.0)
    return result


@pytest.mark.parametrize("kind", MismatchCorrection)
def test_mismatch_correction_equals_the_formulas(kind: MismatchCorrection) -> None:
    generator = random.Random(0)
    config = LossConfig(mismatch_correction=kind, mismatch_cap=1.5, mismatch_bounds=[0.6, 1.6])
    seen = set()
    for _ in range(200):
        length = generator.randint(0, 4)
        old = [generator.uniform(-3, 0) for _ in range(length)]
        rollout = [o + generator.gauss(0, 0.4) for o in old]
        mask = [generator.randint(0, 1) for _ in range(length)]
        result = mismatch_correction(old, rollout, mask, config)
        expected = slow_correction(old, rollout, mask, config)
        np.testing.assert_allclose(result, expected, rtol=1e-5)
        seen |= {e for e, m in zip(expected, mask, strict=True) if m}
    if kind is MismatchCorrection.none:
        assert seen == {1.0}
    elif kind in (MismatchCorrection.icepop, MismatchCorrection.sequence_rejection):
        assert 0.0 in seen and len(seen) > 1
    else:
        assert 1.5 in seen and len(seen) > 10


@pytest.mark.parametrize("kind", MismatchCorrection)
def test_mismatch_correction_is_neutral_when_engines_agree_and_safe_when_they_do_not(
    kind: MismatchCorrection,
) -> None:
    config = LossConfig(mismatch_correction=kind)
    logprobs = np.array([-0.5, -2.0, -1.0])
    np.testing.assert_array_equal(mismatch_correction(logprobs, logprobs, [1, 1, 1], config), 1.0)
    masked = np.array([-0.5, -math.inf, math.nan])
    np.testing.assert_array_equal(mismatch_correction(masked, logprobs, [1, 0, 0], config), 1.0)
    apart = mismatch_correction([0.0] * 3, [-1e4] * 3, [1, 1, 1], config)
    assert np.isfinite(apart).all() and apart.max() <= 2.0


def test_mismatch_correction_refuses() -> None:
    tis = LossConfig(mismatch_correction=MismatchCorrection.tis_token)
    with pytest.raises(ValueError, match="rollout_logprobs: 1 of 2 values are not finite"):
        mismatch_correction([0, 0], [0, -math.inf], [1, 1], tis)
    with pytest.raises(ValueError, match="must agree"):
        mismatch_correction([0, 0], [0], [1, 1], tis)
    with pytest.raises(ValueError, match="mismatch_cap"):
        mismatch_correction([0], [0], [1], replace(tis, mismatch_cap=0.0))
    icepop = LossConfig(mismatch_correction=MismatchCorrection.icepop, mismatch_bounds=[2.0, 1.0])
    with pytest.raises(ValueError, match="mismatch_bounds"):
        mismatch_correction([0], [0], [1], icepop)
