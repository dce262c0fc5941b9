"""Options of every command that writes shards."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from functools import reduce, wraps
from typing import Any

import click

from copd_megatron.cli.parameters import COUNT, COUNT_OR_NONE, PATH, SEED

_IN_NO_NAME = frozenset("/\\*?[]{}")


class _DomainName(click.ParamType):
    """What shards' names begin with, and what a pattern of shards in a configuration can hold."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name; a usage error for one that no pattern would find, or that is a path."""
        name = str(value)
        if not name.strip() or not name.isprintable() or name[0] in ".-" or _IN_NO_NAME & set(name):
            self.fail(
                f"{name!r} cannot begin the names of shards; use letters, digits, - and _, such as physics.",
                param,
                ctx,
            )
        return name


_SHARDS = (
    click.option("--out", type=PATH, required=True, help="Folder for the shards."),
    click.option(
        "--name",
        type=_DomainName(),
        required=True,
        help="Shards are NAME-train-*.tar and NAME-validation-*.tar.",
    ),
    click.option(
        "--validation",
        "num_validation",
        type=COUNT_OR_NONE,
        default=0,
        show_default=True,
        help="Number of samples for validation.",
    ),
    click.option("--seed", type=SEED, default=0, show_default=True, help="Same seed, same shards."),
    click.option("--shard-size", type=COUNT, default=1000, show_default=True, help="Samples in one shard."),
    click.option("--overwrite", is_flag=True, help="Replace shards of this name."),
)


def shard_options[F: Callable[..., object]](function: F) -> F:
    """Adds ``out``, ``name``, ``num_validation``, ``seed``, ``shard_size`` and ``overwrite``. A command that
    is terminated deletes its unfinished shards."""

    @wraps(function)
    def ends_in_order(*arguments: Any, **options: Any) -> object:
        before = signal.signal(signal.SIGTERM, _end)
        try:
            return function(*arguments, **options)
        finally:
            signal.signal(signal.SIGTERM, before)

    return reduce(lambda inner, option: option(inner), reversed(_SHARDS), ends_in_order)  # type: ignore


def _end(number: int, _: object) -> None:
    """As an exception, which passes what cleans up."""
    sys.exit(128 + number)
