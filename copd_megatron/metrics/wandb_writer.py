"""Weights & Biases. wandb is imported where it is used, because it is optional and slow to import."""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from copd_megatron.config.schema import WandbConfig
from copd_megatron.untrusted.regular_file import read_regular
from copd_megatron.untrusted.whole_file import write_whole

_RUN_ID = "wandb_run_id"


class WandbWriter:
    """A ``writers.Writer`` that logs each step to W&B.

    The run directory keeps the W&B id, so that a resumed run continues the same W&B run. W&B cannot remove
    steps: it drops those that a resumed run repeats, which are the same numbers, and warns about it.
    """

    def __init__(self, run_dir: Path, run_name: str, options: WandbConfig, config: Mapping[str, Any]) -> None:
        """
        Args:
            run_dir: where the id is kept; wandb's own files go to ``<run_dir>/wandb``.
            config: the resolved settings, shown with the curves.

        Raises:
            ImportError: the ``wandb`` package is missing (``packages.check_packages`` reports it earlier).
            wandb.errors.Error: no login or no network. ``WANDB_MODE=offline`` writes files for ``wandb
            sync``.
        """
        wandb: Any = import_module("wandb")
        path = run_dir / _RUN_ID
        if not path.is_file():
            write_whole(path, uuid.uuid4().hex[:16] + "\n")
        self._run = wandb.init(
            dir=run_dir,
            id=read_regular(path, 1000).decode().strip(),
            resume="allow",
            project=options.project,
            entity=options.entity,
            name=options.name or run_name,
            group=options.group,
            tags=list(options.tags),
            config=dict(config),
        )

    def write(self, step: int, phase: str, metrics: Mapping[str, float]) -> None:
        """Logs one step, without values that are not finite."""
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self._run.log({**finite, "phase": phase}, step=step)

    def finish(self, step: int, figures: Mapping[str, float]) -> None:
        """Puts the figures into the run's summary."""
        self._run.summary.update({name: value for name, value in figures.items() if math.isfinite(value)})

    def truncate_after(self, step: int) -> None:
        """Does nothing: W&B cannot remove steps."""

    def close(self, *, failed: bool = False) -> None:
        """Uploads the rest. Marks the run as crashed if it ``failed``."""
        self._run.finish(exit_code=int(failed))
