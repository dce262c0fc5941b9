#!/usr/bin/env python3
"""Write train and validation shards of procedural image and video tasks, with PNG and MP4 members.

    python tools/make_visual_data.py --out data --name image --train 4000 --validation 200 --seed 1 \\
        --family count --set max_count=9

Several families, mixed 3 to 1, with settings for each:

    ... --family direction:3 --family temporal_grounding:1 \\
        --set direction.diagonal=true --set temporal_grounding.iou_threshold=0.5

Videos have 8 frames at 4 a second unless told otherwise: read them with media.frame_rate: 4.
--list shows all families with their settings and defaults.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from copd_megatron.tiny.tasks.families import families
from copd_megatron.tiny.tasks.text import family_options
from copd_megatron.tiny.tasks.visual import VisualShare, write_visual_domain


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="show families and settings, and end")
    parser.add_argument("--out", type=Path, help="folder for the shards")
    parser.add_argument("--name", help="domain: shards are <name>-train-*.tar, <name>-validation-*.tar")
    parser.add_argument("--family", action="append", default=[], help="family, or family:weight")
    parser.add_argument("--set", action="append", default=[], help="setting=value, or family.setting=value")
    parser.add_argument("--train", type=int, help="number of training samples")
    parser.add_argument("--validation", type=int, default=0, help="number of validation samples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-size", type=int, default=1000, help="samples per shard")
    parser.add_argument("--prompt-suffix", default="", help="put after every prompt")
    parser.add_argument("--overwrite", action="store_true", help="replace shards of this name")
    parsed = parser.parse_args(arguments)
    needed = ("out", "name", "family", "train")
    missing = [f"--{name}" for name in needed if not getattr(parsed, name) and getattr(parsed, name) != 0]
    if missing and not parsed.list:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    return parsed


def shares_of(arguments: argparse.Namespace) -> list[VisualShare]:
    """Families with their weights and settings. Raises DataError for a setting that belongs to none."""
    return [
        VisualShare(name=name, weight=weight, settings=settings)
        for name, weight, settings in family_options(arguments.family, arguments.set)
    ]


def describe() -> str:
    """Every family with its settings and their defaults."""
    lines = []
    for name, family in sorted(families().items()):
        lines.append(f"{name} ({family.kind}): {(family.make.__doc__ or '').strip().splitlines()[0]}")
        for item in dataclasses.fields(family.settings):
            default = list(item.default) if isinstance(item.default, tuple) else item.default
            lines.append(f"    {item.name}={json.dumps(default)}")
    return "\n".join(lines)


def main() -> int:
    arguments = parse_arguments()
    if arguments.list:
        print(describe())
        return 0
    try:
        written = write_visual_domain(
            arguments.out,
            arguments.name,
            shares_of(arguments),
            num_train=arguments.train,
            num_validation=arguments.validation,
            seed=arguments.seed,
            prompt_suffix=arguments.prompt_suffix,
            shard_size=arguments.shard_size,
            overwrite=arguments.overwrite,
        )
    except ValueError as error:  # DataError
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(written.describe(arguments.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
