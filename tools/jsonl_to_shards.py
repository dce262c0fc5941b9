#!/usr/bin/env python3
"""Turn JSONL files into train (and validation) shards.

    python tools/jsonl_to_shards.py questions.jsonl --out data --name physics --prompt-field question \\
        --answer-field final_answer --verifier math --validation 200

Field names may be paths (``reward_model.ground_truth``). A prompt is a string or a list of chat messages.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from copd_megatron.data.convert.jsonl import FieldMap, convert_jsonl


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", type=Path, nargs="+", help="JSONL files")
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards")
    parser.add_argument(
        "--name", required=True, help="shards are <name>-train-*.tar, <name>-validation-*.tar"
    )
    parser.add_argument("--prompt-field", default="prompt")
    parser.add_argument("--answer-field", default="answer")
    parser.add_argument("--verifier-field", default="verifier")
    parser.add_argument("--verifier", help="for lines without a verifier of their own")
    parser.add_argument("--metadata-field", default="metadata")
    parser.add_argument("--keep", action="append", default=[], help="further field to keep in the metadata")
    parser.add_argument("--key-field", help="field with the sample's key (default: running number)")
    parser.add_argument("--prompt-suffix", default="", help="put after every prompt")
    parser.add_argument("--validation", type=int, default=0, help="number of prompts to hold out")
    parser.add_argument("--seed", type=int, default=0, help="chooses the prompts that are held out")
    parser.add_argument("--shard-size", type=int, default=1000, help="samples per shard")
    parser.add_argument(
        "--skip-bad", action="store_true", help="skip and count bad lines instead of stopping"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace shards of this name")
    return parser.parse_args(arguments)


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = parse_arguments()
    fields = FieldMap(
        prompt=arguments.prompt_field,
        answer=arguments.answer_field,
        verifier=arguments.verifier_field,
        default_verifier=arguments.verifier,
        metadata=arguments.metadata_field,
        extra_metadata=tuple(arguments.keep),
        key=arguments.key_field,
    )
    try:
        written = convert_jsonl(
            arguments.sources,
            arguments.out,
            arguments.name,
            fields,
            num_validation=arguments.validation,
            seed=arguments.seed,
            prompt_suffix=arguments.prompt_suffix,
            shard_size=arguments.shard_size,
            skip_bad=arguments.skip_bad,
            overwrite=arguments.overwrite,
        )
    except ValueError as error:  # DataError
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(written.describe(arguments.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
