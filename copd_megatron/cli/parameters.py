"""Arguments and options that several commands take."""

from __future__ import annotations

import logging
import math
import sys
from pathlib import Path
from typing import Any

import click

from copd_megatron.untrusted.visible import visible

_UNITS = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

PATH: click.Path = click.Path(path_type=Path)
"""A file or folder; whoever opens it says when it is not there, and what should be."""

COUNT = click.IntRange(1, 2**31 - 1)

COUNT_OR_NONE = click.IntRange(0, 2**31 - 1)

WORKERS = click.IntRange(1, 1024)
"""Processes or threads: more than a machine has cores is waste, thousands more take it down."""

SEED = click.IntRange(0, 2**63 - 1)

OVERRIDES = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
"""Settings in place of the file's, before or behind options."""


class Finite(click.FloatRange):
    """A number in a range. click's own takes NaN into every range, and infinity into an open one."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number; a usage error when it is none, or not in the range."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


class _Temperature(Finite):
    """Of sampling, as vLLM samples; 0 for the most probable token each time."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The temperature; a usage error where vLLM would take another one in its place."""
        number = super().convert(value, param, ctx)
        if 0 < number < 0.01:
            self.fail(f"{value} is so low that vLLM samples at 0.01; give 0, or 0.01 and more.", param, ctx)
        return number


TEMPERATURE = _Temperature(0, 2)


class _TopK(click.IntRange):
    """So many of the most probable tokens, or -1 for all."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number; a usage error for 0 tokens."""
        number = int(super().convert(value, param, ctx))
        if number == 0:
            self.fail("0 tokens leave nothing to sample; give 1 or more, or -1 for all.", param, ctx)
        return number


TOP_K = _TopK(-1, 2**31 - 1)


class Size(click.ParamType):
    """A number of bytes: ``100``, ``500MB``, ``2GiB``."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The size in bytes; a usage error when it is none, or not above 0."""
        text = str(value)
        digits = text.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
        unit = text[len(digits) :].strip().upper()
        unit = unit[:-1] if unit in ("KB", "MB", "GB") else unit
        try:
            size = int(float(digits) * _UNITS[unit])
        except (ValueError, KeyError, OverflowError):
            self.fail(f"{text!r} is not a size; write 500MB or 2GiB", param, ctx)
        if size <= 0:
            self.fail(f"{text!r} is not above 0", param, ctx)
        return size


def log_plainly() -> None:
    """Sends what the package logs to standard error, message by message, for commands without a run's
    logs."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Plain("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


class _Plain(logging.Formatter):
    """The message alone, harmless for a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def step_range(option: str, text: str) -> tuple[int, int]:
    """``3`` or ``3-5`` as first and last step; a usage error when it is neither."""
    first, _, last = text.partition("-")
    try:
        found = int(first), int(last or first)
    except ValueError:
        raise click.UsageError(f"{option} {text}: write 3, or 3-5.", click.get_current_context()) from None
    if found[0] > found[1]:
        raise click.UsageError(
            f"{option} {text}: the first step lies behind the last; write {found[1]}-{found[0]}.",
            click.get_current_context(),
        )
    return found
