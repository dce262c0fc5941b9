"""Weights & Biases. Imports wandb where it is used: it is optional, and slow to import."""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from copd_megatron.config.schema import WandbConfig

_RUN_ID = "wandb_run_id"


class WandbWriter:
    """A ``writers.Writer`` that logs each step to W&B.

    The run's id is kept in the run directory, so that a run that resumes goes on in the same W&B run. W&B
    cannot take steps back: those that a resumed run does again it drops (they are the same numbers), with a
    warning of its own.
    """

    def __init__(self, run_dir: Path, run_name: str, options: WandbConfig, config: Mapping[str, Any]) -> None:
        """
        Args:
            run_dir: holds the id; wandb's own files go to ``<run_dir>/wandb``.
            config: the resolved settings, shown beside the curves.

        Raises:
            ImportError: the ``wandb`` package is missing (``packages.check_packages`` says so beforehand).
            wandb.errors.Error: no login, no network: ``WANDB_MODE=offline`` writes files for ``wandb sync``.
        """
        wandb: Any = import_module("wandb")
        path = run_dir / _RUN_ID
        if not path.is_file():
            path.write_text(uuid.uuid4().hex[:16] + "\n")
        self._run = wandb.init(
            dir=run_dir,
            id=path.read_text().strip(),
            resume="allow",
            project=options.project,
            entity=options.entity,
            name=options.name or run_name,
            group=options.group,
            tags=list(options.tags),
            config=dict(config),
        )

    def write(self, step: int, phase: str, metrics: Mapping[str, float]) -> None:
        """Logs one step; values that are not finite are left out."""
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self._run.log({**finite, "phase": phase}, step=step)

    def truncate_after(self, step: int) -> None:
        """Nothing can be taken back; see the class."""

    def close(self, *, failed: bool = False) -> None:
        """Uploads the rest; marks the run as crashed if it ``failed``."""
        self._run.finish(exit_code=int(failed))
