"""What the jobs do that tests of the runner run: ``main([name, folder])``."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path


def append(folder: Path, letter: str) -> int:
    """Writes a letter behind those that are there."""
    with (folder / "order").open("a") as file:
        file.write(letter)
    return 0


def alone(folder: Path) -> int:
    """Fails if another process does the same at the same time."""
    mark = folder / f"r{os.getpid()}"
    mark.touch()
    time.sleep(0.3)
    count = len(list(folder.glob("r*")))
    mark.unlink()
    return 0 if count == 1 else 1


def needs_ok(folder: Path) -> int:
    return 0 if (folder / "ok").exists() else 1


def raises(folder: Path) -> int:
    raise ValueError("of no use")


def ranks(folder: Path) -> int:
    """Notes its rank; rank 1 fails, rank 0 waits for it much longer than it lives."""
    rank = os.environ["RANK"]
    (folder / f"rank{rank}of{os.environ['WORLD_SIZE']}").touch()
    if rank == "0":
        time.sleep(60)
    return 1


def out_of_reach(folder: Path) -> int:
    """Fails if the ranks' store can be reached at another address than the loopback address itself."""
    with socket.socket() as other:
        refused = other.connect_ex(("127.0.0.2", int(os.environ["MASTER_PORT"]))) == errno.ECONNREFUSED
    with socket.socket() as own:
        reached = own.connect_ex(("127.0.0.1", int(os.environ["MASTER_PORT"]))) == 0
    return 0 if refused and reached and os.environ["GLOO_SOCKET_IFNAME"] == "lo" else 1


def sleeps(folder: Path) -> int:
    scratch = folder / "child.tmp"
    scratch.write_text(str(os.getpid()))
    scratch.rename(folder / "child")
    time.sleep(60)
    return 0


def nothing(folder: Path) -> int:
    return 0


def main(argv: Sequence[str]) -> int:
    name, folder, *more = argv
    status: int = globals()[name](Path(folder), *more)
    return status
