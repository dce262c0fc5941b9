"""How much a configuration grows when its interpolations are resolved, told before they are.

``a: ${b}${b}``, ``b: ${c}${c}`` ... doubles with each line, and each reference is resolved anew, so that
thirty short lines take hours and all memory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from copd_megatron.errors import ConfigError

MAX_RESOLVED: Final = 100_000
"""Most characters and references that all interpolations of a configuration may resolve to."""
_REFERENCE = re.compile(r"(?<!\\)\$\{([^${}]*)\}")
_STEPS = re.compile(r"[^.\[\]]+")


def check_interpolations(settings: Mapping[str, Any], origin: str) -> None:
    """Raises ConfigError, naming ``origin`` and the key, for interpolations that grow beyond
    ``MAX_RESOLVED``, go in a circle, or stand in each other."""
    sizes = _Sizes(settings, origin)
    total = 0
    for path, text in _texts(settings, ()):
        if "${" in text:
            total += sizes.of_text(path, text)
            if total > MAX_RESOLVED:
                raise sizes.too_large(path)


def _texts(value: Any, path: tuple[str, ...]) -> list[tuple[tuple[str, ...], str]]:
    """Path and text of every string beneath a value."""
    if isinstance(value, str):
        return [(path, value)]
    items = (
        value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    )
    return [found for key, item in items for found in _texts(item, (*path, str(key)))]


class _Sizes:
    """Sizes of resolved texts, each computed once."""

    def __init__(self, settings: Mapping[str, Any], origin: str) -> None:
        self._settings, self._origin = settings, origin
        self._known: dict[tuple[str, ...], int | None] = {}

    def of_text(self, path: tuple[str, ...], text: str) -> int:
        """Characters that a text resolves to, plus the references on the way."""
        if path in self._known:
            known = self._known[path]
            if known is None:
                raise ConfigError(f"{self._origin}: {'.'.join(path)}: its interpolation goes in a circle")
            return known
        self._known[path] = None
        rest = _REFERENCE.sub("", text)
        if re.search(r"(?<!\\)\$\{", rest):
            raise ConfigError(
                f"{self._origin}: {'.'.join(path)}: an interpolation that holds another one is not "
                "supported: refer to a key by its name"
            )
        size = len(rest) + sum(1 + self._of_reference(path, match[1]) for match in _REFERENCE.finditer(text))
        if size > MAX_RESOLVED:
            raise self.too_large(path)
        self._known[path] = size
        return size

    def too_large(self, path: tuple[str, ...]) -> ConfigError:
        """The error of a text that grows too much."""
        return ConfigError(
            f"{self._origin}: {'.'.join(path)}: with this interpolation the settings grow beyond "
            f"{MAX_RESOLVED} characters; write the value itself"
        )

    def _of_reference(self, path: tuple[str, ...], reference: str) -> int:
        """Size of what a key, or the arguments of a resolver (``oc.select:a.b,default``), stand for."""
        _, colon, arguments = reference.partition(":")
        keys = arguments.split(",") if colon else [reference]
        return sum(self._of_key(path, key.strip().strip("'\"")) for key in keys)

    def _of_key(self, path: tuple[str, ...], key: str) -> int:
        up = len(key) - len(key.lstrip("."))
        steps = (*(path[: len(path) - up] if up else ()), *_STEPS.findall(key))
        found: Any = self._settings
        for step in steps:
            if isinstance(found, Mapping):
                found = found.get(step)
            elif isinstance(found, list) and step.isdigit() and int(step) < len(found):
                found = found[int(step)]
            else:
                found = None
        return len(key) + sum(1 + self.of_text(at, text) for at, text in _texts(found, steps))
