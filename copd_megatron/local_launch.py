"""torchrun on this machine, with an exit status that says whether starting again makes sense.

    python -m copd_megatron.local_launch RUN_DIR [torchrun's arguments]

torchrun itself ends with 1 whatever its ranks end with. This ends with ``EXIT_PREEMPTED`` when the ranks did,
or when a signal ended the job and there is a checkpoint to continue from.
"""

from __future__ import annotations

import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from copd_megatron.checkpoint.manifest import complete_checkpoints
from copd_megatron.checkpoint.stop import EXIT_PREEMPTED


def main(arguments: list[str]) -> int:
    """Runs torchrun with ``arguments[1:]`` for the run directory ``arguments[0]``."""
    run_dir, *rest = arguments
    try:
        torchrun(rest)
    except ChildFailedError as error:
        if any(failure.exitcode == EXIT_PREEMPTED for failure in error.failures.values()):
            return EXIT_PREEMPTED
        raise
    except SignalException as error:
        return EXIT_PREEMPTED if complete_checkpoints(Path(run_dir)) else 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
