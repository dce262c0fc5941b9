"""One rank of a local job that ends as it is told. Started by test_local_launch.py."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from copd_megatron.cli import main as cli
from copd_megatron.errors import ConfigError, RunStorageError
from copd_megatron.launch.rank_process import take_one_interrupt
from copd_megatron.metrics.rank_log import RankPlace, start_logging


def eat(group: Path) -> None:
    """Takes memory in a control group until the kernel ends this."""
    (group / "cgroup.procs").write_text(str(os.getpid()))
    held = []
    while True:
        held.append(bytearray(os.urandom(1 << 20)))


def _cannot_save(number: int, frame: object) -> None:
    raise RunStorageError("stopping after step 3 of 9 (SIGTERM), which could not be saved")


def main() -> int:
    run_dir, how = Path(sys.argv[1]), sys.argv[2]
    rank = int(os.environ["RANK"])
    (run_dir / f"started_{rank}_{os.environ['COPD_RESTART_COUNT']}").touch()
    start_logging(
        RankPlace(rank=rank, branch="a", branch_rank=rank, branch_size=2), "INFO", folder=run_dir, append=True
    )

    def fail(_: list[str]) -> int:
        if how == "interrupt" and rank == 0:
            while not (run_dir / "started_1_0").exists():
                time.sleep(0.1)
            os.kill(os.getppid(), signal.SIGINT)
        if how == "unsaved":
            signal.signal(signal.SIGTERM, _cannot_save)
            if rank == 0:
                while not (run_dir / "started_1_0").exists():
                    time.sleep(0.1)
                os.kill(os.getppid(), signal.SIGTERM)
        if how == "killed" and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "memory" and rank == 1:
            eat(Path(os.environ["FULL_GROUP"]))
        if how in ("config", "bug") and rank == 1:
            raise (ConfigError("run.seed: no good") if how == "config" else KeyError("a bug"))
        time.sleep(60)
        return 0

    take_one_interrupt()
    cli._run = fail
    return cli.main([])


if __name__ == "__main__":
    sys.exit(main())
