"""What a process does first when it becomes a rank. Imports no torch."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import warnings
from types import FrameType

from copd_megatron.config import Config
from copd_megatron.launch.run_dir import run_directory, starts_anew
from copd_megatron.metrics.rank_log import RankPlace, start_logging
from copd_megatron.topology.layout import Layout

_PR_SET_PDEATHSIG = 1


def log_as_rank(config: Config) -> None:
    """Log lines carry branch and rank; on the console, ranks other than 0 speak up only when something is
    wrong."""
    rank, layout = int(os.environ.get("RANK", "0")), Layout.from_config(config)
    branch = layout.branch_of(rank)
    ranks = layout.ranks_of(branch)
    start_logging(
        RankPlace(rank=rank, branch=branch, branch_rank=ranks.index(rank), branch_size=len(ranks)),
        config.logging.level,
        folder=run_directory(config) if config.logging.rank_files else None,
        append=not starts_anew(config),
    )
    # what the libraries say about kernels that this machine lacks, `copd doctor` says once
    for library in ("megatron", "torch.utils.cpp_extension"):
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
    warnings.filterwarnings("ignore", category=SyntaxWarning)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def take_one_interrupt() -> None:
    """Ctrl-C interrupts this rank once: its terminal and its launcher both send the signal, and the second
    must not interrupt what the rank does in order to end."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, interrupt)


def die_with_launcher() -> None:
    """Under torchrun, the kernel kills this rank when its launcher dies: a rank left over would go on writing
    to a run directory to which a restarted job writes as well."""
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
