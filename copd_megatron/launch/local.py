"""torchrun on this machine, with an exit status that says whether it makes sense to start again.

    python -m copd_megatron.launch.local RUN_DIR [torchrun's arguments]

torchrun itself exits with 1, whatever its ranks exit with. This exits with ``EXIT_PREEMPTED`` when the ranks
did, or when a signal ended the job and there is a checkpoint to continue from. After any other failure all
ranks are started again, up to ``COPD_MAX_RESTARTS`` times, and continue from the newest valid checkpoint.
(torchrun's own --max-restarts would also restart a run that saved and stopped because it was told to.)
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from copd_megatron.checkpoint.manifest import complete_checkpoints
from copd_megatron.checkpoint.stop import EXIT_PREEMPTED
from copd_megatron.launch.rendezvous import register_loopback


def main(arguments: list[str]) -> int:
    """Runs torchrun with ``arguments[1:]`` for the run directory ``arguments[0]``; returns the exit
    status."""
    run_dir, *rest = arguments
    register_loopback()
    limit = int(os.environ.get("COPD_MAX_RESTARTS", "0"))
    try:
        for restarts in range(limit + 1):
            os.environ["COPD_RESTART_COUNT"] = str(restarts)
            try:
                torchrun(rest)
                return 0
            except ChildFailedError as error:
                if any(failure.exitcode == EXIT_PREEMPTED for failure in error.failures.values()):
                    return EXIT_PREEMPTED
                if restarts == limit:
                    raise
                codes = ", ".join(
                    f"rank {rank} with {failure.exitcode}" for rank, failure in error.failures.items()
                )
                print(f"copd: ended: {codes}; restart {restarts + 1} of {limit}", file=sys.stderr, flush=True)
    except SignalException as error:
        return EXIT_PREEMPTED if complete_checkpoints(Path(run_dir)) else 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
