"""torchrun on this machine, with an exit status that says whether it makes sense to start again.

    python -m copd_megatron.launch.local RUN_DIR [torchrun's arguments]

torchrun itself exits with 1, whatever its ranks exit with. This exits with ``EXIT_PREEMPTED`` when the ranks
did, or when a scheduler's signal ended the job and there is a checkpoint to continue from. After a failure
all ranks are started again, up to ``COPD_MAX_RESTARTS`` times, and continue from the newest valid checkpoint,
unless that cannot help (``EXIT_HOPELESS``). (torchrun's own --max-restarts would also restart a run that
saved and stopped because it was told to.) The last lines on the screen say why the run ended and where to
read on.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path
from typing import Final

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from copd_megatron.checkpoint.manifest import complete_checkpoints
from copd_megatron.checkpoint.stop import EXIT_HOPELESS, EXIT_PREEMPTED
from copd_megatron.launch.rendezvous import register_loopback
from copd_megatron.metrics.rank_log import Selection, merged

_PREFIX: Final = re.compile(r"\S+ \S+ \w+\s+\[[^\]]*\] ")
"""Time, level and place of a line in a rank's log."""


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
                hopeless = any(failure.exitcode == EXIT_HOPELESS for failure in error.failures.values())
                if hopeless or restarts == limit:
                    _say(why_it_ended(Path(run_dir), error))
                    return EXIT_HOPELESS if hopeless else 1
                _say(f"ended: {_codes(error)}; restart {restarts + 1} of {limit}")
    except SignalException as error:
        saved = next(iter(complete_checkpoints(Path(run_dir))), None)
        next_time = "nothing is saved yet" if saved is None else f"the same command goes on from step {saved}"
        _say(f"ended by {signal.Signals(error.sigval).name}; {next_time}")
        by_scheduler = error.sigval != signal.SIGINT
        return EXIT_PREEMPTED if saved is not None and by_scheduler else 128 + error.sigval
    return 0


def why_it_ended(run_dir: Path, error: ChildFailedError) -> str:
    """The last words of the rank that failed first, and where to read on."""
    rank, failure = error.get_first_failure()
    read_on = f"copd logs {run_dir} --level ERROR"
    try:
        words = [line for line in merged(run_dir, Selection(rank=rank, level="ERROR")) if line.strip()]
    except FileNotFoundError:  # it failed before it could log
        words, read_on = [], "the lines above"
    cause = _PREFIX.sub("", words[-1]).strip() if words else f"exit status {failure.exitcode}"
    return f"rank {rank} ended the run: {cause}\ncopd: more: {read_on}"


def _codes(error: ChildFailedError) -> str:
    return ", ".join(f"rank {rank} with {failure.exitcode}" for rank, failure in error.failures.items())


def _say(text: str) -> None:
    print(f"copd: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
