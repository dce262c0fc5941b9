"""How torchrun's agent and the ranks of a run on one machine find each other: over the loopback interface
alone.

torchrun's own rendezvous serves a store on all interfaces and unpickles what it finds there. A run on one
machine needs no rendezvous: there is one agent. It serves a store for its ranks on 127.0.0.1 and nothing is
unpickled.
"""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

from copd_megatron.topology.store import serve_store

BACKEND = "copd-loopback"
"""Name for torchrun's ``--rdzv-backend``."""
_LOOPBACK = "127.0.0.1"
_TIMEOUT = timedelta(seconds=300)


class LoopbackRendezvous(RendezvousHandler):
    """The rendezvous of a single agent. Each round of ranks has a store of its own."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._store: dist.TCPStore | None = None
        """Of the present round; it is served as long as it is held."""

    @property
    def use_agent_store(self) -> bool:
        """The ranks use the agent's store, so that it outlives them."""
        return True

    def get_backend(self) -> str:
        return BACKEND

    def next_rendezvous(self) -> RendezvousInfo:
        self._store = serve_store(_LOOPBACK, 0, _TIMEOUT)
        where = RendezvousStoreInfo(master_addr=_LOOPBACK, master_port=self._store.port)
        return RendezvousInfo(store=self._store, rank=0, world_size=1, bootstrap_store_info=where)

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """There is nobody else to tell."""

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        return True


def _create(parameters: RendezvousParameters) -> RendezvousHandler:
    return LoopbackRendezvous(parameters.run_id)


def register_loopback() -> None:
    """Makes ``--rdzv-backend=copd-loopback`` known to torchrun in this process."""
    rendezvous_handler_registry.register(BACKEND, _create)
