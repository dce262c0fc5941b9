"""``copd data make-visual``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from copd_megatron.cli.data.options import shard_options
from copd_megatron.cli.group import Command
from copd_megatron.cli.output import say
from copd_megatron.cli.parameters import COUNT
from copd_megatron.tiny.tasks.families import families as known_families
from copd_megatron.tiny.tasks.text import family_options
from copd_megatron.tiny.tasks.visual import VisualShare, write_visual_domain

EXAMPLES = """
    copd data make-visual --list
    copd data make-visual --out data --name image --train 4000 --validation 200 --seed 1 \\
        --family count --set max_count=9

Several families, mixed 3 to 1, with settings for each:
    copd data make-visual --out data --name video --train 4000 --family direction:3 \\
        --family temporal_grounding:1 --set direction.diagonal=true --set temporal_grounding.iou_threshold=0.5
"""


def _list(context: click.Context, option: click.Parameter, asked: bool) -> None:
    """``--list`` ends the command before the options that it does without are missed."""
    if asked:
        click.echo(describe())
        context.exit()


@click.command("make-visual", cls=Command, examples=EXAMPLES)
@click.option(
    "--list",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_list,
    help="Show the families with their settings and defaults, and end.",
)
@shard_options
@click.option(
    "--family", "families", multiple=True, required=True, help="Family, or FAMILY:WEIGHT; repeatable."
)
@click.option("--set", "settings", multiple=True, help="SETTING=VALUE, or FAMILY.SETTING=VALUE; repeatable.")
@click.option("--train", "num_train", type=COUNT, required=True, help="Number of training samples.")
@click.option("--prompt-suffix", default="", help="Put after every prompt.")
def command(
    out: Path, name: str, families: tuple[str, ...], settings: tuple[str, ...], **options: Any
) -> int:
    """Write shards of image and video tasks.

    The tasks are drawn as they are written, with PNG and MP4 members. Videos have 8 frames at 4 a second
    unless a setting says otherwise: read them with media.frame_rate=4.
    """
    shares = [
        VisualShare(name=family, weight=weight, settings=own)
        for family, weight, own in family_options(families, settings)
    ]
    say(write_visual_domain(out, name, shares, **options).describe(out))
    return 0


def describe() -> str:
    """Every family with its settings and their defaults."""
    lines = []
    for name, family in sorted(known_families().items()):
        lines.append(f"{name} ({family.kind}): {(family.make.__doc__ or '').strip().splitlines()[0]}")
        for item in dataclasses.fields(family.settings):
            default = list(item.default) if isinstance(item.default, tuple) else item.default
            lines.append(f"    {item.name}={json.dumps(default)}")
    return "\n".join(lines)
