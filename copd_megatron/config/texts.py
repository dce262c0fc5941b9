"""What each setting means, in words: the text below its field in ``schema/``, its type, limits and default.

For the tools that explain settings and for the test that every setting has a text.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Any

from copd_megatron.config.bounds import annotated_hints, limits_of
from copd_megatron.config.schema import Config
from copd_megatron.config.typecheck import field_of_hint, join

NAME = "<name>"
"""Stands in a key for the user's own name of a branch."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting or section, described."""

    key: str
    """Dotted, such as ``branches.<name>.rollout.top_p`` or ``opd.edges[0].beta``."""
    is_section: bool
    """It has settings of its own beneath it."""
    expected: str
    """What may be given, in words, limits included."""
    default: Any
    """As the schema has it; ``dataclasses.MISSING`` for a section and for a setting that must be given."""
    text: str
    """What it does, in sentences; empty if nobody wrote any."""


def describe_settings(section: type = Config, prefix: str = "") -> Iterator[Setting]:
    """All settings and sections beneath ``section``, in the order of the schema."""
    hints = annotated_hints(section)
    plain = typing.get_type_hints(section)
    texts = field_texts(section)
    for field in fields(section):
        key, hint = join(prefix, field.name), plain[field.name]
        inner, below = _section_of(hint, key)
        yield Setting(
            key=key,
            is_section=inner is not None,
            expected=_expected(hint, hints[field.name], key),
            default=MISSING if inner is not None else _default(field),
            text=texts.get(field.name) or (_paragraph(inner.__doc__) if inner else ""),
        )
        if inner is not None:
            yield from describe_settings(inner, below)


@functools.cache
def field_texts(section: type) -> Mapping[str, str]:
    """The string literals below a dataclass's fields, by field name, each as one paragraph."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    assert isinstance(tree, ast.ClassDef)
    texts = {}
    for here, after in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(here, ast.AnnAssign) and isinstance(here.target, ast.Name):
            texts[here.target.id] = _paragraph(_text(after))
    return texts


def _text(node: ast.stmt) -> str | None:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return node.value.value if isinstance(node.value.value, str) else None
    return None


def _section_of(hint: Any, key: str) -> tuple[type | None, str]:
    """The dataclass behind a field, alone or in a mapping or a list, and the prefix of its keys."""
    inside: Any = hint
    if typing.get_origin(hint) is dict:
        inside, key = typing.get_args(hint)[1], f"{key}.{NAME}"
    elif typing.get_origin(hint) is list:
        inside, key = typing.get_args(hint)[0], f"{key}[0]"
    return (inside if isinstance(inside, type) and is_dataclass(inside) else None), key


def _expected(plain: Any, hint: Any, key: str) -> str:
    words = field_of_hint(key, plain).expected()
    limits = ", ".join(str(limit) for limit in limits_of(hint))
    return f"{words}: {limits}" if limits else words


def _default(field: Field[Any]) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return MISSING if field.default == "???" else field.default


def _paragraph(text: str | None) -> str:
    return " ".join((text or "").split())
