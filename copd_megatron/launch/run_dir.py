"""Where a run writes, and whether it continues what is there. Imports neither torch nor vLLM."""

from __future__ import annotations

import os
from pathlib import Path

from copd_megatron.config import Config


def run_directory(config: Config) -> Path:
    """Where the run writes."""
    return Path(config.run.dir or f"runs/{config.run.name}")


def starts_anew(config: Config) -> bool:
    """Whether what an earlier run left in the directory is deleted: with ``run.overwrite``, except when a
    launcher restarts the job."""
    launchers = ("TORCHELASTIC", "SLURM", "COPD")
    restarted = any(os.environ.get(f"{launcher}_RESTART_COUNT", "0") != "0" for launcher in launchers)
    return config.run.overwrite and not restarted
