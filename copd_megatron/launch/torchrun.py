"""Starts the ranks of a run on this machine. Imports no torch: the process that it becomes does."""

from __future__ import annotations

import os
import signal
import sys
import uuid
from collections.abc import Sequence
from typing import NoReturn

from copd_megatron.config import Config, Device
from copd_megatron.launch.run_dir import run_directory
from copd_megatron.topology.loopback import only_this_machine


def become_torchrun(
    config: Config, arguments: Sequence[str], program: Sequence[str] = ("-m", "copd_megatron.cli")
) -> NoReturn:
    """Replaces this process by a local torchrun of as many ranks as the branches need.

    Args:
        arguments: of ``copd``, for every rank.
        program: what every rank runs in place of ``copd``.
    """
    ranks = sum(branch.parallel.world_size for branch in config.branches.values())
    defaults = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks)),
        # after a signal the ranks get the time to save
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(max(30, int(config.checkpoint.save_before_seconds))),
    }
    if config.run.device is Device.cpu:
        # vLLM's CPU build announces its memory binding as a warning, in every process
        defaults["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    os.environ |= only_this_machine()
    # else ``python -m`` imports from the working folder first, which ``copd`` does not: a received folder's
    # code would run, or a checkout of vLLM that somebody stands beside would be what trains
    os.environ["PYTHONSAFEPATH"] = "1"
    os.environ["COPD_MAX_RESTARTS"] = str(config.run.max_restarts)
    os.environ["COPD_RUN_ID"] = uuid.uuid4().hex[:12]
    command = [
        *(sys.executable, "-m", "copd_megatron.launch.local", str(run_directory(config))),
        *("--nnodes=1", f"--nproc-per-node={ranks}", f"--rdzv-id={os.environ['COPD_RUN_ID']}"),
        # torchrun's own would listen on all interfaces
        "--rdzv-backend=copd-loopback",
        f"--signals-to-handle={','.join(handled_signals())}",
        *(*program, *arguments),
    ]
    sys.stdout.flush()
    os.execv(sys.executable, command)


def handled_signals() -> list[str]:
    """Signals by which torchrun ends the job: none that this process ignores, as it does below nohup."""
    names = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1")
    return [name for name in names if signal.getsignal(getattr(signal, name)) is not signal.SIG_IGN]
