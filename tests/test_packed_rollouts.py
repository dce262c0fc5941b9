"""Rollouts between the replicas of a branch: exact, in order, and never more than they say."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copd_megatron.records import Prompt, Rollout
from copd_megatron.rollout.packed import PackedRollouts, pack_rollouts, unpack_rollouts
from copd_megatron.topology.messages import MessageError, decode, encode

_LOGPROBS = st.floats(width=32, allow_nan=True, allow_infinity=True)


def _prompt(number: int) -> Prompt:
    return Prompt(
        prompt_id=f"set/{number}",
        domain="text",
        token_ids=np.arange(number, number + 3, dtype=np.int32),
        answer="1",
        verifier="exact",
    )


@st.composite
def _rollouts(draw: st.DrawFn) -> list[Rollout]:
    found = []
    for number in range(draw(st.integers(0, 5))):
        logprobs = draw(st.lists(_LOGPROBS, max_size=6))
        response = draw(st.lists(st.integers(0, 2**31 - 1), min_size=len(logprobs), max_size=len(logprobs)))
        prompt = _prompt(number)
        found.append(
            Rollout(
                prompt=prompt,
                sample_index=draw(st.integers(0, 64)),
                token_ids=np.concatenate([prompt.token_ids, np.array(response, np.int32)]),
                rollout_logprobs=np.array(logprobs, np.float32),
                text=draw(st.text() | st.just("\ud800 is no character")),
                truncated=draw(st.booleans()),
                weight_version=draw(st.integers(-1, 2**40)),
                seed=draw(st.integers(0, 2**56 - 1)),
                reward=draw(st.none() | st.floats()),
                unfinished=draw(st.booleans()),
            )
        )
    return found


def _bits(value: Any) -> Any:
    """Comparable bit for bit."""
    if isinstance(value, np.ndarray):
        return value.dtype, value.tobytes()
    if isinstance(value, float):
        return "nan" if math.isnan(value) else value.hex()
    return value


def _sent(rollouts: list[Rollout]) -> list[Rollout]:
    return list(unpack_rollouts(decode(encode(pack_rollouts(rollouts))), [r.prompt for r in rollouts]))


@settings(deadline=None, max_examples=150)
@given(_rollouts())
def test_rollouts_come_back_bit_for_bit(rollouts: list[Rollout]) -> None:
    for before, after in zip(rollouts, _sent(rollouts), strict=True):
        for field in dataclasses.fields(Rollout):
            assert _bits(getattr(after, field.name)) == _bits(getattr(before, field.name)), field.name


def test_a_rollout_owns_its_arrays() -> None:
    """One that is carried to a later step must not keep the whole batch alive."""
    prompt = _prompt(0)
    rollout = Rollout(
        prompt=prompt,
        sample_index=0,
        token_ids=np.arange(5, dtype=np.int32),
        rollout_logprobs=np.zeros(2, np.float32),
        text="x",
        truncated=False,
        weight_version=1,
        seed=1,
    )
    (after,) = _sent([rollout])
    assert after.rollout_logprobs.base is None and after.token_ids.base is None


@pytest.mark.parametrize(
    "change",
    [
        {"table": np.zeros((1, 7), np.int64)},
        {"table": np.zeros(8, np.int64)},
        {"table": np.array([[0, -1, 0, 0, 0, 0, 0, 0]])},
        {"table": np.array([[0, 2**62, 0, 0, 0, 0, 0, 0]])},
        {"table": np.array([[0, 1, 0, 0, 0, 0, 0, 0]])},
        {"table": np.array([[0, 0, 1, 0, 0, 0, 0, 0]])},
        {"rewards": np.zeros(2)},
        {"logprobs": np.zeros(1, np.float32)},
        {"text": np.array([0xFF], np.uint8), "table": np.array([[0, 0, 1, 0, 0, 0, 0, 0]])},
        {"text": np.zeros(3, np.uint8)},
    ],
    ids=str,
)
def test_arrays_that_do_not_fit_are_refused(change: dict[str, Any]) -> None:
    whole = PackedRollouts(
        table=np.zeros((1, 8), np.int64),
        rewards=np.zeros(1),
        token_ids=np.zeros(0, np.int32),
        logprobs=np.zeros(0, np.float32),
        text=np.zeros(0, np.uint8),
    )
    assert len(list(unpack_rollouts(whole, [_prompt(0)]))) == 1
    with pytest.raises(MessageError, match="packed rollout"):
        list(unpack_rollouts(dataclasses.replace(whole, **change), [_prompt(0)]))
    with pytest.raises(MessageError, match="2 expected"):
        list(unpack_rollouts(whole, [_prompt(0), _prompt(1)]))
