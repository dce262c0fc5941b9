#!/usr/bin/env python3
"""Turn a public data set into train and validation shards.

    python tools/convert_dataset.py --layout polaris polaris.jsonl --out data --name text --validation 500
    python tools/convert_dataset.py --layout mmfinereason train-*.parquet --out data --name image
    python tools/convert_dataset.py --layout onethinker onethinker_rl_train.json --media-root OneThinker \\
        --kind video --out data --name video --validation 500

Layouts, and the fields they assume: copd_megatron/data/convert/public_sets.py.
Rows that cannot be graded by a verifier are skipped; the counts by reason are printed.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from copd_megatron.data.convert.public import Conversion, convert_public
from copd_megatron.data.convert.public_sets import LAYOUTS


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", type=Path, nargs="+", help=".json, .jsonl or .parquet files")
    parser.add_argument("--layout", required=True, choices=sorted(LAYOUTS))
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards")
    parser.add_argument(
        "--name", required=True, help="shards are <name>-train-*.tar, <name>-validation-*.tar"
    )
    parser.add_argument("--media-root", type=Path, help="folder that the rows' paths are relative to")
    parser.add_argument("--kind", choices=("image", "video"), help="take only rows with such media")
    parser.add_argument("--instruction", help="put after every question (default: by kind of answer)")
    parser.add_argument("--limit", type=int, help="stop after so many usable rows")
    parser.add_argument("--validation", type=int, default=0, help="number of rows to hold out")
    parser.add_argument("--seed", type=int, default=0, help="chooses the rows that are held out")
    parser.add_argument("--shard-size", type=int, default=1000, help="samples per shard")
    parser.add_argument("--workers", type=int, default=2, help="processes that check gold answers")
    parser.add_argument("--overwrite", action="store_true", help="replace shards of this name")
    return parser.parse_args(arguments)


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = parse_arguments()
    conversion = Conversion(
        layout=arguments.layout,
        media_root=arguments.media_root,
        kind=arguments.kind,
        instruction=arguments.instruction,
        limit=arguments.limit,
        num_workers=arguments.workers,
    )
    try:
        domain = convert_public(
            arguments.sources,
            arguments.out,
            arguments.name,
            conversion,
            num_validation=arguments.validation,
            seed=arguments.seed,
            shard_size=arguments.shard_size,
            overwrite=arguments.overwrite,
        )
    except ValueError as error:  # DataError
        print(f"error: {error}", file=sys.stderr)
        return 1
    written = domain.written
    print(written.describe(arguments.out))
    for reason, count in sorted(domain.skipped.items()):
        print(f"  skipped {count}: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
