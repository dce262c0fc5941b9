"""Puts the tree that this folder belongs to first on the path, so that every tool runs from a bare checkout
and uses the code beside it even where another copy is installed; and runs ``copd`` under a script's name."""

import sys
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def run(*command: str) -> NoReturn:
    """``run("data", "convert")`` is ``copd data convert`` with the arguments that the script was given."""
    from copd_megatron.cli.main import main

    sys.exit(main([*command, *sys.argv[1:]]))
