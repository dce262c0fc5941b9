#!/usr/bin/env python3
"""Write a checkpoint in Megatron's distributed format as a Hugging Face folder.

    python tools/convert_megatron_to_hf.py runs/copd/checkpoints/step_000100/text exported/text

The checkpoint may be a branch's folder of a joint checkpoint, saved at any layout, or a folder that
tools/convert_hf_to_megatron.py wrote. Works on any machine, holds one piece of a tensor at a time.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from copd_megatron.checkpoint.progress import ProgressLine
from copd_megatron.merge.convert import SHARD_BYTES, megatron_to_hf


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="folder in Megatron's distributed format")
    parser.add_argument("target", type=Path, help="folder to write; must not exist")
    parser.add_argument(
        "--model",
        type=Path,
        help="Hugging Face folder with config.json and tokenizer; default: the one the checkpoint names",
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: as they are")
    parser.add_argument(
        "--shard-bytes",
        type=int,
        default=SHARD_BYTES,
        help="largest file, where the model's folder gives none",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        with ProgressLine() as progress:
            megatron_to_hf(
                options.source,
                options.target,
                model_path=options.model,
                dtype=getattr(torch, options.dtype) if options.dtype else None,
                shard_bytes=options.shard_bytes,
                progress=progress,
            )
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {options.target}: {progress.summary()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
