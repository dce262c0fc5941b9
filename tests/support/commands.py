"""The command line in processes of its own, as a user calls it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The repository."""

_OF_A_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


def environment(**changes: str) -> dict[str, str]:
    """This process's variables without those of a launcher: one thread a process, no GPU."""
    inherited = {name: value for name, value in os.environ.items() if name not in _OF_A_LAUNCHER}
    ours = {"OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return inherited | ours | changes


def copd(*arguments: object, timeout: float = 550) -> subprocess.CompletedProcess[str]:
    """``copd arguments...`` in a process of its own: its status and output.

    Args:
        timeout: seconds after which it is killed.
    """
    return subprocess.run(
        [sys.executable, "-m", "copd_megatron.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment(),
        cwd=ROOT,
        check=False,
    )


def run_script(name: str, *arguments: object, hash_seed: str = "0") -> subprocess.CompletedProcess[str]:
    """``python tools/<name> arguments...`` in a process of its own.

    Args:
        hash_seed: of Python's string hashes, which no output may depend on.
    """
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)],
        env=environment(PYTHONHASHSEED=hash_seed),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
