"""One rank of a local job that says which addresses its processes listen on. Started by test_loopback.py."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

from copd_megatron.topology.world import init_world

_LISTENING = "0A"


def listening_addresses(process: int) -> list[str]:
    """Addresses of a process's listening TCP sockets, from the kernel's tables."""
    sockets = set()
    for link in Path(f"/proc/{process}/fd").iterdir():
        try:
            sockets.add(os.readlink(link))
        except FileNotFoundError:  # closed meanwhile
            continue
    found = []
    for table, family, width in (("tcp", socket.AF_INET, 4), ("tcp6", socket.AF_INET6, 16)):
        for line in Path(f"/proc/{process}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTENING and f"socket:[{fields[9]}]" in sockets:
                raw = bytes.fromhex(fields[1].split(":")[0])
                words = b"".join(raw[i : i + 4][::-1] for i in range(0, width, 4))
                found.append(socket.inet_ntop(family, words))
    return found


def main(out: Path) -> None:
    with init_world(
        {"a": [0], "b": [1, 2]}, device="cpu", timeout_seconds=60, run_id=os.environ["COPD_RUN_ID"]
    ) as world:
        listening = {
            "rank": listening_addresses(os.getpid()),
            "agent": listening_addresses(os.getppid()) if world.is_first else [],
        }
        said = world.all_gather_objects(listening, "addresses")
        if world.is_first:
            out.write_text(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
