"""Makes a seed's base model and shards: ``python -m copd_megatron.reproduction.make SETTING SEED FOLDER``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from copd_megatron.reproduction.material import make_base, make_shards
from copd_megatron.reproduction.setting import SETTINGS


def main(argv: Sequence[str]) -> int:
    name, seed, folder = argv
    material = SETTINGS[name].material(int(seed))
    make_shards(Path(folder) / "data", material)
    make_base(Path(folder) / "base", material)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
