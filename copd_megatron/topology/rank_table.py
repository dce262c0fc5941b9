"""What every rank is doing, written to and read from the job's store.

A rank writes its *state* (operations entered, status, path) whenever it enters or leaves an operation, and a
*beat* (its number, and the state and the seconds spent in it) at every heartbeat.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from torch.distributed import Store

from copd_megatron.topology.store import text_of
from copd_megatron.topology.who_waits import DEAD, RUNNING, UNKNOWN, RankState


def write_state(store: Store, state: RankState) -> None:
    """Says what a rank is doing now. Raises RuntimeError if the store does not answer."""
    store.set(f"watch/state/{state.rank}", f"{state.count}\t{state.status}\t{state.path}")


def write_beat(store: Store, state: RankState, number: int) -> None:
    """Says that a rank lives, for the ``number``-th time. Raises RuntimeError if the store does not
    answer."""
    store.set(f"watch/beat/{state.rank}", f"{number}\t{state.count}\t{state.status}\t{state.seconds:.3f}")


def read_table(
    store: Store, places: Mapping[int, tuple[str, int]], heartbeat_seconds: float, mine: RankState
) -> list[RankState]:
    """Every rank's state, by global rank. Takes 2.5 heartbeats: ranks that do not beat meanwhile are dead.

    Args:
        places: branch and branch rank of every global rank.
        mine: the reader's own state, which the store knows less well.

    Raises:
        RuntimeError: the store does not answer.
    """
    first = _read_all(store, places, "beat")
    time.sleep(2.5 * heartbeat_seconds)
    second = _read_all(store, places, "beat")
    states = _read_all(store, places, "state")
    return [
        mine if rank == mine.rank else _state(rank, *places[rank], states[rank], first[rank], second[rank])
        for rank in sorted(places)
    ]


def _read_all(store: Store, places: Mapping[int, Any], kind: str) -> dict[int, tuple[str, ...] | None]:
    keys = {rank: f"watch/{kind}/{rank}" for rank in places}
    # a get of a missing key would block until the store's timeout
    if store.check(list(keys.values())):
        values = dict(zip(keys, store.multi_get(list(keys.values())), strict=True))
    else:
        values = {rank: store.get(key) for rank, key in keys.items() if store.check([key])}
    return {rank: tuple(map(text_of, values[rank].split(b"\t"))) if rank in values else None for rank in keys}


def _state(
    rank: int,
    branch: str,
    branch_rank: int,
    state: tuple[str, ...] | None,
    first: tuple[str, ...] | None,
    second: tuple[str, ...] | None,
) -> RankState:
    """One rank's state from what it wrote: its state, and its beats at two times."""
    unknown = RankState(
        rank=rank, branch=branch, branch_rank=branch_rank, status=UNKNOWN, path="", count=0, seconds=0.0
    )
    if state is None or second is None:
        return unknown
    try:
        count, status, path = int(state[0]), state[1], state[2]
        same = int(second[1]) == count and second[2] == state[1]
        seconds = float(second[3])
    except (ValueError, IndexError):  # no rank has written this
        return unknown
    # a failed rank ends soon after, and that it failed says more than that it is dead
    if status == RUNNING and first is not None and first[0] == second[0]:
        status = DEAD
    # the beat's seconds belong to the state that it was written in
    return RankState(
        rank=rank, branch=branch, branch_rank=branch_rank, status=status, path=path, count=count,
        seconds=seconds if same else 0.0,
    )  # fmt: skip
