"""Every setting explained: found by key or by word, with its value in a configuration, in text and as a page.

``copd config`` shows it; ``REFERENCE.md`` beside this file is ``markdown()``, and a test compares them.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from dataclasses import MISSING, dataclass
from typing import Any

from copd_megatron.config.load import plain
from copd_megatron.config.schema import Config
from copd_megatron.config.texts import NAME, Setting, describe_settings
from copd_megatron.config.typecheck import root_field

_PLACE = re.compile(r"\[\d+\]")


@dataclass(frozen=True, kw_only=True)
class Value:
    """What a configuration gives a setting."""

    key: str
    """With the user's own names: ``branches.text.rollout.top_p``."""
    value: Any
    """Plain: enums by name."""
    is_default: bool


def find_settings(key: str | None = None, word: str | None = None) -> list[Setting]:
    """Settings and sections in the order of the schema.

    Args:
        key: the setting of this key, or the section with all beneath it; None: all. The name of a branch and
            the index of an edge may be any.
        word: only those with this text in key or documentation, in any case.

    Raises:
        ConfigError: there is no such key; names the nearest.
    """
    found = list(describe_settings())
    if key is not None:
        _check_key(key)
        found = [setting for setting in found if _is_at(setting.key, key)]
    if word is not None:
        small = word.lower()
        found = [s for s in found if small in s.key.lower() or (small in s.text.lower() and not s.is_section)]
    return found


def values_of(setting: Setting, config: Config) -> list[Value]:
    """What ``config`` gives the setting: one value, or one for each branch or edge that has it."""
    places: list[tuple[str, Any]] = [("", config)]
    for part in setting.key.replace("[0]", ".[0]").split("."):
        places = [below for path, holder in places for below in _step(path, holder, part)]
    given = [(path, plain(value)) for path, value in places]
    default = plain(setting.default)
    return [Value(key=path, value=value, is_default=value == default) for path, value in given]


def shown_value(value: Any) -> str:
    """A value as it is typed in YAML; ``required`` where there is no default."""
    if value is MISSING:
        return "required"
    value = plain(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(shown_value, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {shown_value(item)}" for name, item in value.items()) + "}"
    return f"{value:g}" if isinstance(value, float) else ("''" if value == "" else str(value))


def markdown() -> str:
    """The reference page: a heading for each section, a table of its settings."""
    everything = list(describe_settings())
    parents = {_parent(setting.key) for setting in everything}
    lines = [
        "# Settings",
        "",
        "Every setting with its default and meaning. `copd config KEY` shows one in the terminal, with "
        "`--file my.yaml` also the value that a configuration gives it. This page is written by "
        "`copd config --markdown`; a test compares the two.",
    ]
    for section in [None, *(s for s in everything if s.is_section)]:
        inside = "" if section is None else _inside(section.key, parents)
        settings = [s for s in everything if not s.is_section and _parent(s.key) == inside]
        if not settings:
            continue
        lines += ["", f"## {'The run' if section is None else f'`{inside}`'}", ""]
        lines += [section.text, ""] if section is not None else []
        lines += ["| setting | what may be given | default | meaning |", "|---|---|---|---|"]
        for s in settings:
            name = s.key.removeprefix(inside).removeprefix(".")
            cells = [f"`{name}`", _cell(s.expected), f"`{_cell(shown_value(s.default))}`", _cell(s.text)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _step(path: str, holder: Any, part: str) -> Iterator[tuple[str, Any]]:
    """What stands below a place at one part of a key."""
    if part == NAME:
        yield from ((f"{path}.{name}", value) for name, value in holder.items())
    elif part == "[0]":
        yield from ((f"{path}[{index}]", value) for index, value in enumerate(holder))
    else:
        yield (f"{path}.{part}" if path else part), getattr(holder, part)


def _check_key(key: str) -> None:
    place = root_field(Config, extra={})
    for part in re.findall(r"[^.\[\]]+", key):
        place = place.child(int(part) if place.is_list and part.isdigit() else part, origin="copd config")


def _is_at(key: str, wanted: str) -> bool:
    """Whether a setting is the wanted one or beneath it."""
    mine, theirs = key.split("."), _general(wanted).split(".")
    return len(mine) >= len(theirs) and all(
        here == NAME or here in (there, f"{there}[0]") for here, there in zip(mine, theirs, strict=False)
    )


def _general(key: str) -> str:
    """A key with index 0 in the place of any index."""
    return _PLACE.sub("[0]", key)


def _inside(key: str, parents: Container[str]) -> str:
    """The prefix of the settings in a section, which may be a mapping or a list of such sections."""
    return next((key + each for each in (f".{NAME}", "[0]") if key + each in parents), key)


def _parent(key: str) -> str:
    return key.rpartition(".")[0]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
