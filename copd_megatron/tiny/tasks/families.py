"""What a visual task is, and the registry of families of tasks."""

from __future__ import annotations

import dataclasses
import difflib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from copd_megatron.errors import DataError
from copd_megatron.tiny.tasks.canvas import COLORS, SHAPES


@dataclass(frozen=True, kw_only=True)
class VisualTask:
    """One task. It is not drawn before it is written."""

    question: str
    """Prompt with ``<image>`` or ``<video>`` in the place of the medium."""
    answer: str
    verifier: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    scene: tuple[Any, ...]
    """Everything that is drawn, as plain values. Two tasks with equal question and scene are the same
    task."""
    draw: Callable[[], Mapping[str, bytes]]
    """Returns the media members by extension."""

    @property
    def identity(self) -> str:
        """Equal for equal tasks."""
        return repr((self.question, self.scene))


@dataclass(frozen=True, kw_only=True)
class VisualFamily:
    """A kind of task: its settings (a frozen dataclass that controls the difficulty) and its generator."""

    name: str
    kind: str
    """``image`` or ``video``."""
    settings: type[Any]
    make: Callable[[Any, random.Random], VisualTask]

    def configure(self, settings: Mapping[str, Any]) -> Any:
        """The family's settings, with these values instead of the defaults. Lists become tuples.

        Raises DataError for an unknown name (suggesting the nearest), a wrong type, or values that the family
        refuses.
        """
        fields = {item.name: item for item in dataclasses.fields(self.settings)}
        values: dict[str, Any] = {}
        for name, value in settings.items():
            if name not in fields:
                near = difflib.get_close_matches(name, fields, n=1)
                hint = f"Did you mean {near[0]!r}?" if near else f"It has: {', '.join(sorted(fields))}."
                raise DataError(f"family {self.name!r} has no setting {name!r}. {hint}")
            default = fields[name].default
            given = tuple(value) if isinstance(value, list) else value
            if isinstance(default, float) and type(given) is int:
                given = float(given)
            if default is not None and type(given) is not type(default):
                raise DataError(
                    f"family {self.name!r}: {name} must be of type {type(default).__name__}, like its "
                    f"default {default!r}; got {value!r}."
                )
            values[name] = given
        try:
            return self.settings(**values)
        except ValueError as error:
            raise DataError(f"family {self.name!r} refuses the settings {dict(settings)}: {error}") from error


_families: dict[str, VisualFamily] = {}


def visual_family(
    name: str, kind: str, settings: type[Any]
) -> Callable[[Callable[[Any, random.Random], VisualTask]], Callable[[Any, random.Random], VisualTask]]:
    """Decorator that registers a function (settings, random source) -> task as a family."""

    def decorate(
        make: Callable[[Any, random.Random], VisualTask],
    ) -> Callable[[Any, random.Random], VisualTask]:
        assert name not in _families, f"family {name} is defined twice"
        _families[name] = VisualFamily(name=name, kind=kind, settings=settings, make=make)
        return make

    return decorate


def families() -> Mapping[str, VisualFamily]:
    """All families by name."""
    from copd_megatron.tiny.tasks import image, video  # noqa: F401  (they register)

    return dict(_families)


def family(name: str) -> VisualFamily:
    """The family of this name. Raises DataError that suggests the nearest names."""
    known = families()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=2)
        hint = f"Did you mean {' or '.join(near)}? " if near else ""
        raise DataError(f"there is no visual family {name!r}. {hint}Known: {', '.join(sorted(known))}.")
    return known[name]


def require(condition: bool, message: str) -> None:
    """For checks of settings: raises ValueError(message) unless the condition holds."""
    if not condition:
        raise ValueError(message)


def check_names(colors: tuple[str, ...], shapes: tuple[str, ...] = ()) -> None:
    """Raises ValueError unless all names are known and distinct and there is at least one color."""
    for what, given, known in (("color", colors, tuple(COLORS)), ("shape", shapes, SHAPES)):
        unknown = [name for name in given if name not in known]
        require(not unknown, f"unknown {what}(s) {unknown}; known: {', '.join(known)}")
        require(len(set(given)) == len(given), f"{what}s {given} contain a duplicate")
    require(len(colors) > 0, "at least one color is needed")
