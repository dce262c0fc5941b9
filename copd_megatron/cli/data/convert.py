"""``copd data convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from copd_megatron.cli.data.options import shard_options
from copd_megatron.cli.group import Command
from copd_megatron.cli.output import say
from copd_megatron.cli.parameters import COUNT, PATH, WORKERS, log_plainly
from copd_megatron.data.convert.public import Conversion, convert_public
from copd_megatron.data.convert.public_sets import LAYOUTS

EXAMPLES = """
    copd data convert --layout polaris polaris.jsonl --out data --name text --validation 500
    copd data convert --layout mmfinereason train-*.parquet --out data --name image
    copd data convert --layout onethinker onethinker_rl_train.json --media-root OneThinker \\
        --kind video --out data --name video --validation 500
"""


@click.command("convert", cls=Command, examples=EXAMPLES)
@click.argument("sources", nargs=-1, required=True, type=PATH)
@click.option("--layout", required=True, type=click.Choice(sorted(LAYOUTS)), help="Which public set it is.")
@shard_options
@click.option("--media-root", type=PATH, help="Folder that the rows' paths start at.")
@click.option("--kind", type=click.Choice(["image", "video"]), help="Take only rows with such media.")
@click.option("--instruction", help="Put after every question; default: by kind of answer.")
@click.option("--limit", type=COUNT, help="Stop after this many usable rows.")
@click.option(
    "--workers", type=WORKERS, default=2, show_default=True, help="Processes that check gold answers."
)
def command(
    sources: tuple[Path, ...],
    layout: str,
    out: Path,
    name: str,
    media_root: Path | None,
    kind: str | None,
    instruction: str | None,
    limit: int | None,
    workers: int,
    **options: Any,
) -> int:
    """Turn a public data set into shards.

    SOURCES are .json, .jsonl or .parquet files of one set. Rows that no verifier can grade are skipped; how
    many, and why, is printed. The layouts and the fields they assume:
    copd_megatron/data/convert/public_sets.py.
    """
    log_plainly()
    conversion = Conversion(
        layout=layout,
        media_root=media_root,
        kind=kind,
        instruction=instruction,
        limit=limit,
        num_workers=workers,
    )
    domain = convert_public(sources, out, name, conversion, **options)
    say(domain.written.describe(out))
    for reason, count in sorted(domain.skipped.items()):
        say(f"  skipped {count}: {reason}")
    return 0
