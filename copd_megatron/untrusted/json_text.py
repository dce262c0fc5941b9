"""JSON that is read back from a file: bounded in size and nesting, and with fields of the right types.

``json.loads`` takes more than JSON has: NaN and infinities, ``1e999`` as infinity, whole numbers that no
float can hold, and nesting up to Python's own limit, where it raises RecursionError. Code that computes with
such values fails far from the file, and so does a sum of 1e308. ``load`` refuses them with a ValueError, and
``made`` checks an object's fields against the hints of a dataclass, so that a reader needs one ``except
ValueError`` to name file and line.
"""

from __future__ import annotations

import functools
import json
import types
import typing
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

from copd_megatron.untrusted.regular_file import read_regular

MAX_BYTES: Final = 64 << 20
"""Longest text of one value: a line of a file, or a small file as a whole. Far above what the product writes,
and little enough to be held in memory several times."""
MAX_NESTING: Final = 64
"""Of objects and lists. Far below Python's own limit, which depends on who calls."""


MAX_NUMBER: Final = 1e100
"""Sums, squares and ratios of a file's numbers are finite too. No figure of a run comes near it."""


class NestingError(ValueError):
    """Objects and lists stand in each other more than ``MAX_NESTING`` levels deep."""


class Readable(Protocol):
    """A binary file, compressed or not."""

    def readline(self, size: int, /) -> bytes: ...


class Line(NamedTuple):
    """One line of a file."""

    number: int
    """The first one is 1."""
    text: bytes
    whole: bool
    """It ends with a newline. A program that was killed may leave a last line that does not."""


def load(text: str | bytes, *, max_bytes: int = MAX_BYTES) -> Any:
    """The value that a JSON text stands for. Bytes are UTF-8, in which lone surrogates may be encoded.

    Raises:
        NestingError: nested deeper than ``MAX_NESTING``.
        ValueError: it is no JSON, longer than ``max_bytes``, or holds a number beyond ``MAX_NUMBER``.
    """
    return _load(text, max_bytes, parse_float=_finite)


def _load(text: str | bytes, max_bytes: int, **parse: Any) -> Any:
    if len(text) > max_bytes:
        raise ValueError(f"it is longer than {max_bytes} bytes")
    if isinstance(text, bytes):
        text = text.decode("utf-8", "surrogatepass")
    try:
        value = json.loads(text, parse_constant=_no_constant, parse_int=_whole, **parse)
    except RecursionError:
        raise _too_nested() from None
    if text.count("[") + text.count("{") > MAX_NESTING and nests_deeper(value, MAX_NESTING):
        raise _too_nested()
    return value


class WrittenFloat(float):
    """A number with a point or an exponent that ``str`` gives back as it was written: 1.10, 1e5."""

    def __new__(cls, text: str) -> WrittenFloat:
        made = super().__new__(cls, _finite(text))
        made._text = text
        return made

    _text: str

    def __str__(self) -> str:
        return self._text

    def __reduce__(self) -> tuple[type[WrittenFloat], tuple[str]]:
        return WrittenFloat, (self._text,)


def load_as_written(text: str | bytes, *, max_bytes: int = MAX_BYTES) -> Any:
    """As ``load``, and nothing of what is written gets lost: numbers are ``WrittenFloat``, and a name may
    occur in an object once.

    Raises:
        NestingError, ValueError: as ``load``, or a name occurs twice.
    """
    return _load(text, max_bytes, parse_float=WrittenFloat, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        name = next(name for number, (name, _) in enumerate(pairs) if name in dict(pairs[:number]))
        raise ValueError(
            f"the name {name!r:.60} occurs twice in an object, and one of the values would be lost"
        )
    return found


def load_object(text: str | bytes) -> dict[str, Any]:
    """As ``load``, and it is an object."""
    value = load(text)
    if not isinstance(value, dict):
        raise ValueError(f"it is {kind_of(value)}, expected an object")
    return value


def load_file(path: Path, *, inside: Path | None = None) -> dict[str, Any]:
    """The object that a small file holds; ``inside`` as in ``open_regular``.

    Raises:
        OSError: it cannot be read.
        ValueError: as ``load_object``. The message does not name the file.
    """
    return load_object(read_regular(path, MAX_BYTES, inside=inside))


def lines_of(file: Readable, path: Path, *, max_bytes: int = MAX_BYTES) -> Iterator[Line]:
    """The lines of an open file, one at a time, so that memory is bounded by the longest line.

    Raises:
        ValueError: a line is longer than ``max_bytes``; names ``path`` and the line.
    """
    number = 0
    while text := file.readline(max_bytes + 1):
        number += 1
        if len(text) > max_bytes:
            raise ValueError(
                f"{path}, line {number} is longer than {max_bytes} bytes: remove the line, or the file"
            )
        yield Line(number, text, text.endswith(b"\n"))


def made[T](cls: type[T], record: Mapping[str, Any]) -> T:
    """A dataclass from a JSON object, every field of the type that the class says.

    Hints may be made of the JSON types, ``Sequence``, ``list``, ``tuple[X, ...]``, ``Mapping``, ``dict``,
    enumerations by value, other dataclasses, unions and Any. A whole number is as good as a float. Numbers in
    ``record`` are finite if ``load`` read them.

    Raises:
        ValueError: a field is missing, unknown or of another type; names the field.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"it is {kind_of(record)}, expected an object")
    hints = _hints(typing.cast(Hashable, cls))
    if unknown := [name for name in record if name not in hints]:
        raise ValueError(f"unknown field {unknown[0]!r:.60}")
    if missing := [name for name in _required(typing.cast(Hashable, cls)) if name not in record]:
        raise ValueError(f"field {missing[0]!r} is missing")
    return cls(**{name: _checked(value, hints[name], name) for name, value in record.items()})


def nests_deeper(value: Any, limit: int) -> bool:
    """Whether objects and lists stand in each other more than ``limit`` levels deep."""
    level, depth = [value], 0
    while level:
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += item.values()
            elif isinstance(item, list):
                below += item
        level, depth = [item for item in below if isinstance(item, dict | list)], depth + 1
        if level and depth >= limit:
            return True
    return False


def loadable(value: Any) -> Any:
    """The same value with null in place of numbers that ``load`` would refuse."""
    if isinstance(value, int | float) and not _fits(value):
        return None
    if isinstance(value, Mapping):
        return {key: loadable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [loadable(item) for item in value]
    return value


def dumped(value: Any, *, indent: int | None = None) -> str:
    """The JSON text of a value, with null in place of numbers that ``load`` would refuse: a score that nobody
    has is NaN here, and JSON has no such number."""
    return json.dumps(loadable(value), indent=indent, allow_nan=False)


def kind_of(value: Any) -> str:
    """What a JSON value is, in words, with its beginning."""
    if value is None:
        return "null"
    name = next(
        name
        for types_, name in (
            (bool, "a truth value"),
            (int | float, "a number"),
            (str, "a string"),
            (list, "a list"),
            (Mapping, "an object"),
            (object, type(value).__name__),
        )
        if isinstance(value, types_)
    )
    return name if isinstance(value, list | Mapping) else f"{name} ({value!r:.40})"


def _checked(value: Any, hint: Any, where: str) -> Any:
    """The value as its hint says it: a list becomes a tuple where the hint is a tuple, and so on."""
    if hint is Any:
        return value
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return _one_of(value, typing.get_args(hint), where)
    if origin is not None:
        return _container(value, hint, origin, where)
    if is_dataclass(hint) and isinstance(hint, type):
        try:
            return made(hint, value)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _member(value, hint, where)
    if hint is float and type(value) in (int, float):
        return value
    if type(value) is not (type(None) if hint is None else hint):
        raise ValueError(f"{where} is {kind_of(value)}, expected {getattr(hint, '__name__', hint)}")
    return value


def _one_of(value: Any, hints: Sequence[Any], where: str) -> Any:
    problems = []
    for hint in hints:
        try:
            return _checked(value, hint, where)
        except ValueError as error:
            problems.append(error)
    raise problems[0]


def _container(value: Any, hint: Any, origin: Any, where: str) -> Any:
    arguments = typing.get_args(hint)
    if issubclass(origin, Mapping):
        if not isinstance(value, dict):
            raise ValueError(f"{where} is {kind_of(value)}, expected an object")
        return {key: _checked(item, arguments[1], f"{where}[{key!r:.40}]") for key, item in value.items()}
    if not isinstance(value, list):
        raise ValueError(f"{where} is {kind_of(value)}, expected a list")
    items = [_checked(item, arguments[0], f"{where}[{place}]") for place, item in enumerate(value)]
    return tuple(items) if origin is tuple else items


def _member[E: Enum](value: Any, kind: type[E], where: str) -> E:
    try:
        return kind(value)
    except (ValueError, TypeError):
        known = ", ".join(str(member.value) for member in kind)
        raise ValueError(f"{where} is {kind_of(value)}, expected one of {known}") from None


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


@functools.cache
def _required(cls: Any) -> tuple[str, ...]:
    return tuple(f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING)


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")


def _fits(value: float) -> bool:
    return abs(value) <= MAX_NUMBER  # false for NaN


def _finite(text: str) -> float:
    value = float(text)
    if not _fits(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _whole(text: str) -> int:
    _finite(text)  # also bounds the digits that int() has to read
    return int(text)


def _too_nested() -> NestingError:
    return NestingError(f"it nests objects and lists more than {MAX_NESTING} levels deep")
