"""YAML in which every scalar stays the text that was written.

YAML guesses a scalar's type from its looks: ``695e0514`` is an infinite number, ``07`` seven, ``012`` ten,
``no`` false, ``12:30`` seven hundred and fifty. A setting's type is known, so nothing has to be guessed:
``parse_yaml`` leaves scalars as they are, and ``typecheck.py`` reads each as what its setting is.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

from copd_megatron.untrusted.yaml_text import load_yaml

_NULL = ("", "~", "null", "Null", "NULL")
_BOOLEANS = {
    **dict.fromkeys(("true", "yes", "on", "y", "1"), True),
    **dict.fromkeys(("false", "no", "off", "n", "0"), False),
}
_DECIMAL = re.compile(r"[-+]?[0-9][0-9_]*")
_OTHER_BASE = re.compile(r"[-+]?0[xXoObB][0-9a-fA-F_]+")
_MOST_DIGITS = 100
"""Python converts no decimal number of more than a few thousand."""


class Scalar(str):
    """A scalar of YAML, as written."""

    quoted: bool = False

    @classmethod
    def of(cls, text: str, *, quoted: bool = False) -> Scalar:
        """``quoted``: it stood in quotes, and so is no null."""
        scalar = cls(text)
        scalar.quoted = quoted
        return scalar

    @property
    def is_null(self) -> bool:
        return not self.quoted and self in _NULL


class _Loader(yaml.SafeLoader):
    """Safe YAML with texts for scalars; a key that occurs twice in a mapping is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"found duplicate key {key.value}", key.start_mark
                    )
                seen.add(key.value)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def _construct(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Scalar:
    return Scalar.of(node.value, quoted=node.style is not None)


for _tag in ("null", "bool", "int", "float", "timestamp", "str", "value", "merge"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _construct)


def parse_yaml(text: str) -> Any:
    """One document as dictionaries, lists and ``Scalar``; None if it is empty.

    Raises:
        yaml.YAMLError: not valid YAML, a duplicate key, or aliases that stand for too much.
        RecursionError: nested hundreds of levels deep.
    """
    return load_yaml(text, _Loader)


def as_bool(text: str) -> bool:
    """YAML's words for true and false, 1 and 0. Raises ValueError."""
    try:
        return _BOOLEANS[text.lower()]
    except KeyError:
        raise ValueError(text) from None


def as_int(text: str) -> int:
    """A whole number; leading zeros are those of a decimal number. Raises ValueError."""
    if len(text) <= _MOST_DIGITS:
        if _DECIMAL.fullmatch(text):
            return int(text, 10)
        if _OTHER_BASE.fullmatch(text):
            return int(text, 0)
    raise ValueError(text)


def as_float(text: str) -> float:
    """A number, which may be infinite or not a number. Raises ValueError."""
    if not text.isascii():
        raise ValueError(text)
    try:
        return float(as_int(text))
    except ValueError:
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


def looks_like_a_number(text: str) -> bool:
    """Whether a message shows the text without quotes."""
    try:
        return not math.isnan(as_float(text))
    except ValueError:
        return False
