"""YAML whose aliases cannot stand for more than is written and a bound allows.

``a: &a [x, x]``, ``b: &b [*a, *a]``, ``c: [*b, *b]`` ... costs nothing to parse, since the lists are shared,
and doubles with each line for whoever copies or walks the result; merge keys (``<<``) do so while parsing.
"""

from __future__ import annotations

from typing import Any, Final

import yaml

MAX_NODES: Final = 100_000
"""Most values that a document may hold, each alias counted as all that it stands for. The largest settings
have a few thousand."""


def load_yaml(text: str | bytes, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """One document, by a loader that makes plain values only; None if it is empty.

    Raises:
        yaml.YAMLError: not valid YAML, larger than ``MAX_NODES``, or a value that holds itself.
        RecursionError: nested hundreds of levels deep.
        ValueError: a scalar that cannot be what it looks like, such as an impossible date.
    """
    reader = loader(text)
    try:
        node = reader.get_single_node()
        if node is None:
            return None
        _count(node, {})
        return reader.construct_document(node)
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
