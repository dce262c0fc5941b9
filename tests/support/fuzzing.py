"""Damage to bytes and to JSON values, drawn by hypothesis."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

SHORT = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
LONG = settings(max_examples=30_000, deadline=None, suppress_health_check=list(HealthCheck))

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def damaged(data: st.DataObject, whole: bytes, places: int = 6) -> bytes:
    """Some bytes changed, and perhaps a piece cut out or doubled; most changes near the headers."""
    out = bytearray(whole)
    for _ in range(data.draw(st.integers(1, places))):
        near = data.draw(st.booleans())
        at = data.draw(st.integers(0, min(len(out), 700 if near else len(out)) - 1))
        out[at] = data.draw(st.sampled_from([0, 1, 0x2D, 0x7F, 0x80, 0xFF, out[at] ^ 1, out[at] ^ 0x10]))
    if data.draw(st.integers(0, 3)) == 0:
        begin, end = sorted(data.draw(st.tuples(st.integers(0, len(out)), st.integers(0, len(out)))))
        out[begin:end] = bytes(out[begin:end]) * data.draw(st.sampled_from([0, 2]))
    return bytes(out)


def damaged_value(data: st.DataObject, value: Any) -> Any:
    """A JSON value with one of its parts replaced, removed or added, at any depth."""
    if isinstance(value, dict) and value and data.draw(st.integers(0, 4)):
        key = data.draw(st.sampled_from(sorted(value)))
        how = data.draw(st.integers(0, 9))
        if how == 0:
            return {name: part for name, part in value.items() if name != key}
        if how == 1:
            return {**value, data.draw(st.text(max_size=4)): data.draw(JSON)}
        return {**value, key: damaged_value(data, value[key])}
    if isinstance(value, list) and value and data.draw(st.integers(0, 4)):
        at = data.draw(st.integers(0, len(value) - 1))
        return [*value[:at], damaged_value(data, value[at]), *value[at + 1 :]]
    return data.draw(JSON)
