"""Names and types of raw settings, checked against the dataclasses of ``schema.py`` before they are merged.

OmegaConf refuses unknown keys and bad types as well, but names neither the file or override at fault nor
the key that was probably meant; this module does.
"""

from __future__ import annotations

import difflib
import functools
import reprlib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Any

from copd_megatron.config.scalars import Scalar, as_bool, as_float, as_int, looks_like_a_number
from copd_megatron.errors import ConfigError

_EXPECTED: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
}


@dataclass(frozen=True)
class Field:
    """One place in the settings: its dotted path and the type hint that ``schema.py`` gives it."""

    path: str
    hint: Any
    optional: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further keys allowed here besides the dataclass's own."""

    @property
    def is_section(self) -> bool:
        """A dataclass: a fixed set of keys."""
        return is_dataclass(self.hint)

    @property
    def is_mapping(self) -> bool:
        """``dict[str, X]``: keys are the user's own names."""
        return typing.get_origin(self.hint) is dict

    @property
    def is_list(self) -> bool:
        return typing.get_origin(self.hint) is list

    def names(self) -> list[str]:
        """Keys that a section knows."""
        return [f.name for f in fields(self.hint)] + list(self.extra)

    def child(self, part: str | int, origin: str) -> Field:
        """The place at key or index ``part``. Raises ConfigError when there is none."""
        if self.is_section:
            name = str(part)
            if name not in self.names():
                raise unknown_key(origin, join(self.path, name), candidates=self.names())
            hint = self.extra.get(name) or _hints(self.hint)[name]
            return field_of_hint(join(self.path, name), hint)
        if self.is_mapping:
            return field_of_hint(join(self.path, str(part)), typing.get_args(self.hint)[1])
        if self.is_list:
            if not isinstance(part, int):
                raise ConfigError(f"{origin}: {self.path} is a list; give an index, not {part!r}")
            return field_of_hint(f"{self.path}[{part}]", typing.get_args(self.hint)[0])
        raise ConfigError(f"{origin}: {self.path} is {self.expected()}, it has no key {part!r}")

    def expected(self) -> str:
        """What belongs here, in words."""
        if self.is_section or self.is_mapping:
            text = "a mapping"
        elif self.is_list:
            text = f"a list, each item {field_of_hint(self.path, typing.get_args(self.hint)[0]).expected()}"
        elif isinstance(self.hint, type) and issubclass(self.hint, Enum):
            text = "one of " + ", ".join(self.hint.__members__)
        else:
            text = _EXPECTED[self.hint]
        return f"{text} or null" if self.optional else text


def root_field(config_class: type, extra: Mapping[str, Any]) -> Field:
    """The top of the settings, with keys that only YAML knows."""
    return Field(path="", hint=config_class, extra=extra)


def check_value(value: Any, place: Field, origin: str) -> Any:
    """Reads what ``parse_yaml`` left as text, as what belongs in ``place`` and beneath it.

    Empty sections (``run:``) become empty mappings. Interpolations (``${run.seed}``) stay as they are.

    Raises:
        ConfigError: names ``origin`` (file or override), the full key, the value and what was expected.
    """
    if isinstance(value, Scalar) and value.is_null:
        value = None
    if isinstance(value, str) and "${" in value:
        return str(value)
    if value is None:
        if place.optional:
            return None
        if place.is_section or place.is_mapping:
            return {}
        raise _bad_value(value, place, origin)
    if place.is_section or place.is_mapping:
        if not isinstance(value, dict):
            raise _bad_value(value, place, origin)
        return {str(k): check_value(v, place.child(k, origin), origin) for k, v in value.items()}
    if place.is_list:
        if not isinstance(value, list):
            raise _bad_value(value, place, origin)
        return [check_value(v, place.child(i, origin), origin) for i, v in enumerate(value)]
    return _leaf(value, place, origin)


def unknown_key(origin: str, path: str, candidates: Iterable[str]) -> ConfigError:
    """The error for a key that does not exist, with the nearest that does."""
    names = list(candidates)
    prefix, _, name = path.rpartition(".")
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if near:
        hint = f"did you mean {join(prefix, near[0])!r}?"
    elif names:
        hint = f"keys here: {', '.join(sorted(names))}"
    else:
        hint = "there are none here"
    return ConfigError(f"{origin}: unknown key {path!r}; {hint}")


def join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def field_of_hint(path: str, hint: Any) -> Field:
    """A field from a type hint; ``X | None`` becomes an optional X."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (inner,) = (arg for arg in typing.get_args(hint) if arg is not type(None))
        return Field(path=path, hint=inner, optional=True)
    return Field(path=path, hint=hint)


@functools.cache
def _hints(section: type) -> dict[str, Any]:
    return typing.get_type_hints(section)


def _leaf(value: Any, place: Field, origin: str) -> Any:
    """The text of a scalar as the type of its setting: text stays text, 012 is twelve."""
    if not isinstance(value, Scalar):
        raise _bad_value(value, place, origin)
    text = str(value)
    if place.hint is str:
        _check_unicode(text, place, origin)
        return text
    try:
        if place.hint is bool:
            return as_bool(text)
        if place.hint is int:
            return as_int(text)
        if place.hint is float:
            return as_float(text)
        return place.hint[text].name
    except (ValueError, KeyError) as error:
        raise _bad_value(value, place, origin) from error


def _check_unicode(text: str, place: Field, origin: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{origin!a}: {place.path}: {text!a} is not text that UTF-8 can hold; it was probably typed or "
            "pasted in another encoding"
        ) from error


def _bad_value(value: Any, place: Field, origin: str) -> ConfigError:
    if value is None:
        shown, note = "null", " (quote it if the word is meant)" if place.hint is str else ""
    else:
        number = isinstance(value, str) and looks_like_a_number(value)
        shown, note = str(value) if number else reprlib.repr(value), ""
    return ConfigError(f"{origin}: {place.path}: {shown} is not {place.expected()}{note}")
