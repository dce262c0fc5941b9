"""``copd train`` on ranks that are forked from a process which has imported everything they need.

What a rank imports costs it about 20 seconds of CPU, several times what a run of these tests computes. A test
of what a run computes starts it here. A test of how a run is started, stopped or restarted starts it as a
user does (``commands.copd``, ``checkpoint_runs.training``).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from copd_megatron.config import load_config
from tests.support.distributed import launch_distributed


@dataclass(frozen=True, kw_only=True)
class WarmRun:
    """How a run ended."""

    status: int
    """The largest exit status of its ranks."""
    output: str
    """Of all ranks, one after the other."""


def train_warm(config: Path, *overrides: str, timeout: float = 400) -> WarmRun:
    """``copd train CONFIG OVERRIDES`` on as many ranks as the branches need, one thread each.

    Args:
        timeout: seconds after which the ranks are killed.
    """
    settings = load_config(config, overrides)
    world_size = sum(branch.parallel.world_size for branch in settings.branches.values())
    outcomes = launch_distributed(
        _rank,
        world_size,
        args=(["train", str(config), *overrides],),
        timeout=timeout,
        stop_on_failure=True,
        megatron=True,
    )
    statuses = [1 if o.result is None else o.result for o in outcomes]
    return WarmRun(status=max(statuses), output="\n".join(f"{o.output}\n{o.error or ''}" for o in outcomes))


def _rank(arguments: list[str]) -> int:
    """The whole life of a rank; its exit status."""
    from copd_megatron.cli.main import main

    sys.argv = ["copd", *arguments]
    return main(arguments)
