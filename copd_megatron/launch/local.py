"""torchrun on this machine, with an exit status that says whether starting again makes sense.

    python -m copd_megatron.launch.local RUN_DIR [torchrun's arguments]

torchrun itself exits with 1, whatever its ranks exit with. This exits with ``EXIT_PREEMPTED`` when the ranks
did, or when a scheduler's signal ended the job and there is a checkpoint to continue from. After a failure
all ranks are started again, up to ``COPD_MAX_RESTARTS`` times, and continue from the newest valid checkpoint,
unless that cannot help (``EXIT_HOPELESS``). (torchrun's own --max-restarts would also restart a run that
saved and stopped because it was told to.) The last lines on the screen say why the run ended, where the next
start continues, and where to read on.
"""

from __future__ import annotations

import os
import signal
import sys
from datetime import datetime
from pathlib import Path

from copd_megatron.checkpoint.manifest import complete_checkpoints
from copd_megatron.checkpoint.stop import EXIT_PREEMPTED
from copd_megatron.errors import EXIT_HOPELESS, RunStorageError
from copd_megatron.launch.cause import memory_kills, why_it_ended
from copd_megatron.metrics.rank_log import LOGS
from copd_megatron.untrusted.visible import visible


def main(arguments: list[str]) -> int:
    """Runs torchrun with ``arguments[1:]`` for the run directory ``arguments[0]``."""
    run_dir, rest = Path(arguments[0]), arguments[1:]
    try:
        return _launch(run_dir, rest)
    except KeyboardInterrupt:  # before torchrun handles signals
        return _end_by_signal(run_dir, signal.SIGINT)


def _launch(run_dir: Path, rest: list[str]) -> int:
    # imported here, because it takes seconds in which a person may press Ctrl-C
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    from copd_megatron.launch.rendezvous import register_loopback

    register_loopback()
    limit = int(os.environ.get("COPD_MAX_RESTARTS", "0"))
    since = datetime.now()
    try:
        for restarts in range(limit + 1):
            os.environ["COPD_RESTART_COUNT"] = str(restarts)
            since, kills = datetime.now(), memory_kills()
            try:
                torchrun(rest)
                return 0
            except ChildFailedError as error:
                exits = {rank: failure.exitcode for rank, failure in error.failures.items()}
            if EXIT_PREEMPTED in exits.values():
                return EXIT_PREEMPTED
            cause = why_it_ended(run_dir, exits, since=since, kills_before=kills)
            _say(f"the run ended: {cause}")
            hopeless = EXIT_HOPELESS in exits.values()
            if hopeless or restarts == limit:
                _say(_next_start(run_dir, mended=hopeless))
                _say(_where_to_read_on(run_dir))
                return EXIT_HOPELESS if hopeless else 1
            codes = ", ".join(f"rank {rank} with {code}" for rank, code in exits.items())
            _say(f"ended: {codes}; restart {restarts + 1} of {limit}")
    except SignalException as error:
        cause = why_it_ended(run_dir, {}, since=since)
        if f": {RunStorageError.__name__}: " in cause:  # what the signal asked to be saved is not
            _say(f"the run ended: {cause}")
            _say(_next_start(run_dir, mended=True))
            return EXIT_HOPELESS
        return _end_by_signal(run_dir, signal.Signals(error.sigval))
    return 0


def _end_by_signal(run_dir: Path, number: signal.Signals) -> int:
    """Says so, and returns the exit status: a scheduler starts the job again if there is something to
    continue from, a person does not want that."""
    _say(f"ended by {number.name}; {_next_start(run_dir)}")
    by_person = number is signal.SIGINT
    return EXIT_PREEMPTED if complete_checkpoints(run_dir) and not by_person else 128 + number


def _next_start(run_dir: Path, *, mended: bool = False) -> str:
    """What the same command would do; ``mended``: not before somebody has mended what ended the run."""
    saved = next(iter(complete_checkpoints(run_dir)), None)
    if saved is None:
        return "nothing is saved yet"
    return ("when that is mended, " if mended else "") + f"the same command continues from step {saved}"


def _where_to_read_on(run_dir: Path) -> str:
    """A run whose directory was removed has no logs."""
    logs = f"copd logs {run_dir} --level ERROR, and " if (run_dir / LOGS).is_dir() else ""
    return f"more: {logs}the lines above"


def _say(text: str) -> None:
    print(f"copd: {visible(text)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
