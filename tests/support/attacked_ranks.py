"""One rank of a local job that talks for a while, and checks what it hears. Started by test_loopback.py."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import numpy as np

from copd_megatron.topology.notes import Notes
from copd_megatron.topology.world import init_world


def main(out: Path, seconds: float) -> None:
    with init_world(
        {"a": [0], "b": [1, 2]}, device="cpu", timeout_seconds=30, run_id=os.environ["COPD_RUN_ID"]
    ) as world:
        begin, number, notes = time.monotonic(), 0, Notes(world, "attack")
        last = False
        while not last:
            mine = {"rank": world.rank, "number": number, "data": np.full(100, world.rank + number)}
            said = world.all_gather_objects({**mine, "late": time.monotonic() - begin > seconds}, "talk")
            for rank, value in enumerate(said):
                assert (value["rank"], value["number"]) == (rank, number)
                np.testing.assert_array_equal(value["data"], np.full(100, rank + number))
            if world.is_branch_first:
                notes.leave(number, world.branch)
                assert notes.read(number) == ["a", "b"]
            assert world.branch_gather(number) == [number] * world.branch_size
            last = any(value["late"] for value in said)
            number += 1
            time.sleep(0.01)
        if world.is_first:
            out.write_text(str(number))


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
