"""Options of every command that writes shards."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import click

from copd_megatron.cli.parameters import COUNT, COUNT_OR_NONE, PATH, SEED

_SHARDS = (
    click.option("--out", type=PATH, required=True, help="Folder for the shards."),
    click.option("--name", required=True, help="Shards are NAME-train-*.tar and NAME-validation-*.tar."),
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
    """Adds ``out``, ``name``, ``num_validation``, ``seed``, ``shard_size`` and ``overwrite``."""
    return reduce(lambda inner, option: option(inner), reversed(_SHARDS), function)
