"""Whether every rank has come, and with the same configuration.

Global rank 0 looks at what all have written and tells the others in one key, so that each of n ranks waits
for one key, not for n: the store's work grows with n, not with its square.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Mapping
from datetime import timedelta
from typing import Final

import torch
import torch.distributed as dist

from copd_megatron.topology.store import text_of

_VERDICT: Final = "agreed"
_SPARE_SECONDS: Final = 5.0
"""That the others wait longer than rank 0, for its verdict."""
_LINGER_SECONDS: Final = 1.0
"""That rank 0 stays after a refusal: it may serve the store from which the others read why."""
_MOST_NAMED: Final = 16


class WorldError(RuntimeError):
    """The ranks that were launched do not form the world that the configuration describes."""


def agree(
    store: dist.Store,
    rank: int,
    branch_ranks: Mapping[str, tuple[int, ...]],
    run_id: str,
    timeout_seconds: float,
) -> None:
    """Waits for every rank, and refuses a job whose ranks have different configurations. Collective.

    Raises:
        WorldError: ranks did not come, or came with another configuration; the same message on every rank.
    """
    store.set(f"arrived/{rank}", _stated(branch_ranks, run_id))
    if rank == 0:
        problem = _problem(store, branch_ranks, timeout_seconds)
        store.set(_VERDICT, problem)
        if problem:
            time.sleep(_LINGER_SECONDS)
    else:
        problem = _verdict(store, branch_ranks, timeout_seconds)
    if problem:
        raise WorldError(problem)


def _stated(branch_ranks: Mapping[str, tuple[int, ...]], run_id: str) -> str:
    """What a rank says of its configuration: short, whatever the number of ranks."""
    sizes = {branch: f"{ranks[0]}-{ranks[-1]}" for branch, ranks in branch_ranks.items()}
    digest = zlib.crc32(json.dumps(branch_ranks, allow_nan=False).encode())
    return json.dumps(
        {"run_id": run_id, "branches": sizes, "ranks_crc": digest, "torch": torch.__version__},
        allow_nan=False,
    )


def _places(branch_ranks: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, int, int]]:
    """Key of every rank to branch, branch rank and global rank."""
    return {
        f"arrived/{r}": (branch, i, r) for branch, ranks in branch_ranks.items() for i, r in enumerate(ranks)
    }


def _problem(store: dist.Store, branch_ranks: Mapping[str, tuple[int, ...]], timeout_seconds: float) -> str:
    """What rank 0 finds; empty: nothing."""
    keys = _places(branch_ranks)
    try:
        store.wait(list(keys), timedelta(seconds=timeout_seconds))
    except dist.DistStoreError:
        return _absent(store, keys, timeout_seconds)
    given = dict(zip(keys, store.multi_get(list(keys)), strict=True))
    for key, (branch, i, r) in keys.items():
        if given[key] != given["arrived/0"]:
            return (
                f"{branch} rank {i} (global rank {r}) was started with {text_of(given[key])}, global rank 0 "
                f"with {text_of(given['arrived/0'])}: give every node the same configuration and software"
            )
    return ""


def _verdict(store: dist.Store, branch_ranks: Mapping[str, tuple[int, ...]], timeout_seconds: float) -> str:
    """What rank 0 has found, as the others read it."""
    try:
        store.wait([_VERDICT], timedelta(seconds=timeout_seconds + _SPARE_SECONDS))
        return text_of(store.get(_VERDICT))
    except dist.DistStoreError:
        return _absent(store, _places(branch_ranks), timeout_seconds)


def _absent(store: dist.Store, keys: Mapping[str, tuple[str, int, int]], timeout_seconds: float) -> str:
    absent = [place for key, place in keys.items() if not store.check([key])]
    names = ", ".join(f"{branch} rank {i} (global rank {r})" for branch, i, r in absent[:_MOST_NAMED])
    return (
        f"{len(absent)} of {len(keys)} ranks did not start within {timeout_seconds:.0f} s: {names}; "
        "look at their nodes' logs, or raise run.collective_timeout_seconds"
    )
