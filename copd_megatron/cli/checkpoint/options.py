"""Options of both directions of conversion."""

from __future__ import annotations

import click

DTYPE = click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Type to write; default: each tensor's own.",
)
