#!/usr/bin/env python3
"""Merge branches into one model: mean, weighted, task arithmetic, TIES, DARE, slerp. As ``copd merge``.

python tools/merge_branches.py text image video --out merged
torchrun --nproc-per-node 8 tools/merge_branches.py recipe.yaml --out merged --report
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from copd_megatron.merge import command


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    try:
        return command.run(parser.parse_args(argv))
    except (FileNotFoundError, ValueError) as error:
        print(f"merge_branches.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
