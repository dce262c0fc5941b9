"""YAML whose aliases cannot stand for more than is written and a bound allows, and whose numbers are short.

``a: &a [x, x]``, ``b: &b [*a, *a]``, ``c: [*b, *b]`` ... costs nothing to parse, since the lists are shared,
and doubles with each line for whoever copies or walks the result; merge keys (``<<``) do so while parsing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import yaml

MAX_NODES: Final = 100_000
"""Most values that a document may hold, each alias counted as all that it stands for. The largest settings
have a few thousand."""


_MAX_CHARACTERS: Final = 200
"""Of a number or a date. In base 60 (``1:59:59``) a long one takes hours."""


class _Plain(yaml.SafeLoader):
    """Safe YAML without long numbers."""


def _short(construct: Callable[[yaml.SafeLoader, yaml.ScalarNode], Any]) -> Callable[..., Any]:
    def constructed(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
        if len(node.value) > _MAX_CHARACTERS:
            problem = f"a number or date of {len(node.value)} characters; {_MAX_CHARACTERS} is the limit"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return construct(loader, node)

    return constructed


for _kind in ("int", "float", "timestamp"):
    _tag = f"tag:yaml.org,2002:{_kind}"
    _Plain.add_constructor(_tag, _short(yaml.SafeLoader.yaml_constructors[_tag]))


def load_yaml(text: str | bytes, loader: type[yaml.SafeLoader] = _Plain) -> Any:
    """One document, by a loader that makes plain values only; None if it is empty.

    Raises:
        yaml.YAMLError: not valid YAML, larger than ``MAX_NODES``, a value that holds itself, or one that
            cannot be what its looks or its tag say, such as an impossible date or ``!!bool abc``.
        RecursionError: nested hundreds of levels deep.
    """
    reader = loader(text)
    try:
        node = reader.get_single_node()
        if node is None:
            return None
        _count(node, {})
        return reader.construct_document(node)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        # PyYAML computes with what a tag promises before it has looked whether the text is that
        if isinstance(error, UnicodeError):
            raise
        problem = f"a value is not what it looks like, or what its tag says ({type(error).__name__}: {error})"
        raise yaml.constructor.ConstructorError(None, None, problem[:400], None) from error
    finally:
        reader.dispose()


def _count(node: yaml.Node, known: dict[int, int | None]) -> int:
    """Values that a node stands for; ``known``: by identity, None while it is being counted."""
    if id(node) in known:
        found = known[id(node)]
        if found is None:
            raise yaml.composer.ComposerError(None, None, "a value holds itself", node.start_mark)
        return found
    known[id(node)] = None
    total = 1
    if isinstance(node, yaml.MappingNode):
        total += sum(_count(key, known) + _count(value, known) for key, value in node.value)
    elif isinstance(node, yaml.SequenceNode):
        total += sum(_count(item, known) for item in node.value)
    if total > MAX_NODES:
        problem = f"with its aliases written out it has more than {MAX_NODES} values"
        raise yaml.composer.ComposerError(None, None, problem, node.start_mark)
    known[id(node)] = total
    return total
