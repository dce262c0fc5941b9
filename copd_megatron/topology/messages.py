"""Values as bytes that cannot run as code: what ranks tell each other. Pure.

A message is eight bytes of length, that much JSON, and the raw bytes of the arrays one after the other.
JSON's own types stand for themselves; everything else is an object with one key that says what it is::

    {"tuple": [...]}   {"dict": [[key, value], ...]}   {"path": "runs/a"}
    {"array": ["<f4", [3], 16]}                        type, shape, number of bytes
    {"Written": {"files": ..., "error": null}}         a dataclass that was registered under its name

Floats come back bit for bit, NaN and infinities included. Decoding makes registered dataclasses and nothing
else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path, PurePath
from typing import Any, Final

import numpy as np

_LENGTH_BYTES: Final = 8
_PLAIN_ARRAYS: Final = "biuf"
"""Kinds of numpy types that are numbers: no objects, no strings."""
_PLAIN_TYPE: Final = re.compile(rf"[<>|][{_PLAIN_ARRAYS}]\d{{1,2}}")
"""How numpy names them. It is given no other names: it reads those of structures as Python's syntax."""

_registered: dict[str, type[Any]] = {}


class MessageError(RuntimeError):
    """Bytes that are no message."""


def register[T](cls: type[T]) -> type[T]:
    """Class decorator: messages may hold this dataclass. Its name must be unique among the registered."""
    assert is_dataclass(cls), cls
    known = _registered.setdefault(cls.__name__, cls)
    assert known is cls, f"two classes named {cls.__name__} in messages"
    return cls


def encode(value: Any) -> bytes:
    """The message of a value.

    Raises:
        TypeError: it holds something that messages cannot.
    """
    buffers: list[bytes] = []
    text = json.dumps(_plain(value, buffers), separators=(",", ":")).encode()
    return b"".join([len(text).to_bytes(_LENGTH_BYTES, "little"), text, *buffers])


def decode(data: bytes | bytearray | memoryview) -> Any:
    """The value of a message. Arrays are copies.

    Raises:
        MessageError: the bytes are no message.
    """
    view = memoryview(data)
    end = _LENGTH_BYTES + int.from_bytes(view[:_LENGTH_BYTES], "little")
    if len(view) < _LENGTH_BYTES or end > len(view):
        raise MessageError(f"a message of {len(view)} bytes announces {end}: it was cut, or is none of ours")
    try:
        reader = _Reader(view[end:])
        value = reader.value(json.loads(bytes(view[_LENGTH_BYTES:end])))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise MessageError(f"no message of ours: {type(error).__name__}: {error}") from error
    if reader.rest:
        raise MessageError(f"{reader.rest} bytes follow the last array of a message")
    return value


def _plain(value: Any, buffers: list[bytes]) -> Any:
    """``value`` in JSON's types; arrays go to ``buffers``."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list):
        return [_plain(item, buffers) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [_plain(item, buffers) for item in value]}
    if isinstance(value, Mapping):
        return {"dict": [[_plain(k, buffers), _plain(v, buffers)] for k, v in value.items()]}
    if isinstance(value, PurePath):
        return {"path": str(value)}
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in _PLAIN_ARRAYS:
            raise TypeError(f"messages hold arrays of numbers, not of {value.dtype}")
        buffers.append(np.ascontiguousarray(value).tobytes())
        return {"array": [value.dtype.str, list(value.shape), len(buffers[-1])]}
    name = type(value).__name__
    if _registered.get(name) is type(value):
        return {name: {f.name: _plain(getattr(value, f.name), buffers) for f in fields(value)}}
    raise TypeError(f"messages cannot hold a {type(value).__module__}.{name}; register its dataclass")


class _Reader:
    """Turns JSON's types back, taking arrays from the bytes behind it."""

    def __init__(self, buffers: memoryview) -> None:
        self._buffers, self._offset = buffers, 0

    @property
    def rest(self) -> int:
        """Bytes that no array has taken."""
        return len(self._buffers) - self._offset

    def value(self, plain: Any) -> Any:
        if isinstance(plain, list):
            return [self.value(item) for item in plain]
        if not isinstance(plain, dict):
            return plain
        ((kind, content),) = plain.items()
        if kind == "tuple":
            return tuple(self.value(item) for item in content)
        if kind == "dict":
            return {self.value(key): self.value(item) for key, item in content}
        if kind == "path":
            return Path(content)
        if kind == "array":
            return self._array(*content)
        if kind not in _registered:
            raise ValueError(f"unknown kind {kind!r}")
        return _registered[kind](**{name: self.value(item) for name, item in content.items()})

    def _array(self, dtype: str, shape: list[int], size: int) -> np.ndarray:
        if not _PLAIN_TYPE.fullmatch(dtype) or size < 0 or size > self.rest:
            raise ValueError(f"an array of {size} bytes of {dtype!r:.40}, {self.rest} bytes are left")
        kind = np.dtype(dtype)
        part = self._buffers[self._offset : self._offset + size]
        self._offset += size
        return np.frombuffer(part, dtype=kind).reshape(shape).copy()
