#!/usr/bin/env python3
"""Write train and validation shards of text tasks from reasoning-gym families.

    python tools/make_text_data.py --out data --name arithmetic --train 4000 --validation 200 --seed 1 \\
        --family chain_sum --set min_terms=2 --set max_terms=2 --prompt-suffix ' Answer with the number only.'

Several families, mixed 3 to 1, with settings for each:

    ... --family chain_sum:3 --family spell_backward:1 \\
        --set chain_sum.max_terms=3 --set spell_backward.max_word_len=5
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from copd_megatron.tiny.tasks.text import AUTO_VERIFIER, Family, family_options, write_domain


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards")
    parser.add_argument(
        "--name", required=True, help="domain: shards are <name>-train-*.tar, <name>-validation-*.tar"
    )
    parser.add_argument(
        "--family", action="append", required=True, help="reasoning-gym family, or family:weight"
    )
    parser.add_argument("--set", action="append", default=[], help="setting=value, or family.setting=value")
    parser.add_argument("--train", type=int, required=True, help="number of training samples")
    parser.add_argument("--validation", type=int, default=0, help="number of validation samples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-size", type=int, default=1000, help="samples per shard")
    parser.add_argument("--verifier", default=AUTO_VERIFIER, help="auto, exact, numeric, reasoning_gym, ...")
    parser.add_argument(
        "--template", default="{question}", help="prompt, with {question} where the task goes"
    )
    parser.add_argument("--prompt-suffix", default="", help="put after every prompt")
    parser.add_argument("--overwrite", action="store_true", help="replace shards of this name")
    return parser.parse_args(arguments)


def families_of(arguments: argparse.Namespace) -> list[Family]:
    """Families with their weights and settings. Raises DataError for a setting that belongs to none."""
    return [
        Family(name=name, weight=weight, settings=settings, verifier=arguments.verifier)
        for name, weight, settings in family_options(arguments.family, arguments.set)
    ]


def main() -> int:
    arguments = parse_arguments()
    try:
        written = write_domain(
            arguments.out,
            arguments.name,
            families_of(arguments),
            num_train=arguments.train,
            num_validation=arguments.validation,
            seed=arguments.seed,
            template=arguments.template,
            prompt_suffix=arguments.prompt_suffix,
            shard_size=arguments.shard_size,
            overwrite=arguments.overwrite,
        )
    except ValueError as error:  # DataError, and an unknown verifier
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(written.describe(arguments.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
