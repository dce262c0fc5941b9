"""What ranks tell each other: exact, bounded, and never code."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copd_megatron.topology import messages
from copd_megatron.topology.messages import MessageError, decode, encode, register


@register
@dataclass(frozen=True, kw_only=True)
class _Report:
    """A dataclass that messages may hold."""

    step: int
    parts: tuple[str, ...]


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: (
        st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers(), inner)
    ),
    max_leaves=20,
)


def _same(a: Any, b: Any) -> bool:
    """Equal, of equal types, floats bit for bit (NaN included)."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return np.float64(a).tobytes() == np.float64(b).tobytes() or (math.isnan(a) and math.isnan(b))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same(a[key], b[key]) for key in a)
    return bool(a == b)


@settings(deadline=None, max_examples=200)
@given(_VALUES.filter(lambda value: "\ud800" not in str(value)))
def test_values_come_back_as_they_were(value: Any) -> None:
    assert _same(decode(encode(value)), value)


@pytest.mark.parametrize("dtype", ["<f4", "<f8", "<i4", "<i8", "|u1", "|b1"])
@pytest.mark.parametrize("shape", [(0,), (5,), (2, 3), ()])
def test_arrays_come_back_bit_for_bit(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(1).integers(0, 2, shape).astype(dtype)
    before = {"a": array, "b": [array[..., :0] if shape else array, "x"]}
    after = decode(encode(before))
    assert after["a"].dtype == array.dtype and after["a"].shape == shape
    np.testing.assert_array_equal(after["a"], array)
    after["a"][...] = 0  # writable, and nobody else's


@settings(deadline=None, max_examples=300)
@given(
    st.text("<>|=biufcOSUVMm,()[]'{}:;0123456789 x\n")
    | st.text()
    | st.sampled_from(["f8,", "(2,)f8", "f8=1"])
)
def test_no_other_type_is_given_to_numpy(dtype: str) -> None:
    """numpy reads some names of types as Python's syntax, and others as structures or objects."""
    text = json.dumps({"array": [dtype, [1], 8]}).encode()
    message = len(text).to_bytes(8, "little") + text + bytes(8)
    try:
        array = decode(message)
    except MessageError:
        return
    assert array.dtype == dtype and array.dtype.kind in "biuf" and array.nbytes == 8


def test_registered_dataclasses_and_paths_travel() -> None:
    value = (_Report(step=3, parts=("a", "b")), Path("runs/a"), np.float32(0.1), np.int64(7))
    assert decode(encode(value)) == (
        _Report(step=3, parts=("a", "b")),
        Path("runs/a"),
        float(np.float32(0.1)),
        7,
    )


@dataclass
class _Unknown:
    x: int = 1


@pytest.mark.parametrize("value", [_Unknown(), {1, 2}, object(), np.array(["a"]), np.array([None]), b"x"])
def test_what_messages_cannot_hold_is_an_error_at_the_sender(value: Any) -> None:
    with pytest.raises(TypeError, match=r"messages (cannot )?hold"):
        encode([value])


class _Explodes:
    """What a hostile pickle does when it is read."""

    ran = False

    def __reduce__(self) -> Any:
        return (_explode, ())


def _explode() -> None:
    _Explodes.ran = True


def _framed(plain: Any, tail: bytes = b"") -> bytes:
    text = json.dumps(plain).encode()
    return len(text).to_bytes(8, "little") + text + tail


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps(_Explodes()),
        b"",
        b"\x00" * 7,
        b"\xff" * 64,
        (2**62).to_bytes(8, "little") + b"{}",
        encode({"a": 1})[:-1],
        encode({"a": 1}) + b"x",
        encode(np.zeros(4))[:-1],
        _framed({"_Unknown": {"x": 1}}),
        _framed({"builtins.eval": {"x": "1"}}),
        _framed({"array": ["|O", [1], 8]}, bytes(8)),
        _framed({"array": ["<f4", [10**12], 4]}, bytes(4)),
        _framed({"array": ["<f4", [1], -4]}),
        _framed({"_Report": {"step": 1, "parts": [], "more": 2}}),
        _framed({"tuple": [], "dict": []}),
        _framed({"dict": [[[], 1]]}),
        _framed({"_Report": [1, 2]}),
        _framed({"array": ["<f4", [10**30], 4]}, bytes(4)),
        _framed({"array": [{"names": ["a"], "formats": ["<f4"]}, [1], 4]}, bytes(4)),
        len(b"[" * 100_000).to_bytes(8, "little") + b"[" * 100_000,
    ],
    ids=lambda data: f"{len(data)} bytes",
)
def test_what_is_no_message_is_refused_and_runs_nothing(data: bytes) -> None:
    with pytest.raises(MessageError):
        decode(data)
    assert not _Explodes.ran


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200), st.integers(0, 200))
def test_noise_is_refused(noise: bytes, place: int) -> None:
    """Noise by itself, and noise in the middle of a message."""
    whole = encode({"a": np.arange(5), "b": [_Report(step=1, parts=())]})
    for data in (noise, whole[:place] + noise + whole[place:]):
        try:
            value = decode(data)
        except MessageError:
            continue
        json.dumps(messages._plain(value, []))  # whatever came out is plain


_KINDS = st.sampled_from(
    ["tuple", "dict", "path", "array", "_Report", "_Unknown", "step", "parts", "<f4", "|O"]
)
_HOSTILE = st.recursive(
    _SCALARS | _KINDS | st.integers(-(2**70), 2**70),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_KINDS, inner, max_size=2),
    max_leaves=12,
)


@settings(deadline=None, max_examples=500)
@given(_HOSTILE, st.binary(max_size=16))
def test_well_formed_json_of_the_wrong_shape_is_refused(plain: Any, tail: bytes) -> None:
    try:
        value = decode(_framed(plain, tail))
    except MessageError:
        return
    messages._plain(value, [])


def test_two_classes_of_one_name_are_refused() -> None:
    @dataclass
    class _Report:
        x: int = 1

    with pytest.raises(AssertionError, match="two classes named _Report"):
        register(_Report)
