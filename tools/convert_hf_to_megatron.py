#!/usr/bin/env python3
"""Write a Hugging Face folder in Megatron's distributed format, which jobs of any layout load.

    python tools/convert_hf_to_megatron.py models/Qwen3-4B checkpoints/qwen3-4b

Works on any machine, holds one tensor at a time. Configuration, tokenizer and processor files come along, so
that tools/convert_megatron_to_hf.py gives the same folder back, byte for byte.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from copd_megatron.checkpoint.progress import ProgressLine
from copd_megatron.merge.convert import hf_to_megatron


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="Hugging Face folder")
    parser.add_argument("target", type=Path, help="folder to write; must not exist")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: as they are")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    dtype = getattr(torch, options.dtype) if options.dtype else None
    try:
        with ProgressLine() as progress:
            hf_to_megatron(options.source, options.target, dtype=dtype, progress=progress)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {options.target}: {progress.summary()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
