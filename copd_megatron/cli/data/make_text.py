"""``copd data make-text``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from copd_megatron.cli.data.options import shard_options
from copd_megatron.cli.group import Command
from copd_megatron.cli.output import say
from copd_megatron.cli.parameters import COUNT
from copd_megatron.tiny.tasks.text import AUTO_VERIFIER, Family, family_options, write_domain

EXAMPLES = """
    copd data make-text --out data --name arithmetic --train 4000 --validation 200 --seed 1 \\
        --family chain_sum --set min_terms=2 --set max_terms=2 --prompt-suffix ' Answer with the number only.'

Several families, mixed 3 to 1, with settings for each:
    copd data make-text --out data --name mix --train 4000 --family chain_sum:3 --family spell_backward:1 \\
        --set chain_sum.max_terms=3 --set spell_backward.max_word_len=5
"""


@click.command("make-text", cls=Command, examples=EXAMPLES)
@shard_options
@click.option(
    "--family",
    "families",
    multiple=True,
    required=True,
    help="reasoning-gym family, or FAMILY:WEIGHT; repeatable.",
)
@click.option("--set", "settings", multiple=True, help="SETTING=VALUE, or FAMILY.SETTING=VALUE; repeatable.")
@click.option("--train", "num_train", type=COUNT, required=True, help="Number of training samples.")
@click.option(
    "--verifier", default=AUTO_VERIFIER, show_default=True, help="auto, exact, numeric, reasoning_gym, ..."
)
@click.option(
    "--template", default="{question}", show_default=True, help="Prompt, with {question} where the task goes."
)
@click.option("--prompt-suffix", default="", help="Put after every prompt.")
def command(
    out: Path, name: str, families: tuple[str, ...], settings: tuple[str, ...], verifier: str, **options: Any
) -> int:
    """Write shards of text tasks.

    The tasks come from reasoning-gym families.
    """
    chosen = [
        Family(name=family, weight=weight, settings=own, verifier=verifier)
        for family, weight, own in family_options(families, settings)
    ]
    say(write_domain(out, name, chosen, **options).describe(out))
    return 0
