"""Gloo groups beside torch.distributed's own, and how Gloo connects.

A full mesh takes n - 1 sockets a rank and n - 1 addresses a rank in the store, which grows with the square
of the job. From ``LAZY_FROM`` ranks on, connections are made on first use.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any, Final, Protocol, cast

import torch
import torch.distributed as dist

LAZY_FROM: Final = 128
"""World size from which connections are made on first use."""
INTERFACE: Final = "GLOO_SOCKET_IFNAME"
"""Names the network interface to all Gloo groups, ours and those that libraries make."""
_LAZY: Final = "TORCH_GLOO_LAZY_INIT"


class RouterGroup(Protocol):
    """What ``World`` needs of a Gloo group. To torch's type stubs, the router's is no ``ProcessGroup``."""

    def send(self, tensors: list[torch.Tensor], dstRank: int, tag: int) -> dist.Work: ...
    def recv(self, tensors: list[torch.Tensor], srcRank: int, tag: int) -> dist.Work: ...
    def barrier(self) -> dist.Work: ...
    def broadcast(self, tensors: list[torch.Tensor], opts: Any) -> dist.Work: ...
    def allgather(
        self, output_tensors: list[list[torch.Tensor]], input_tensors: list[torch.Tensor]
    ) -> dist.Work: ...


def is_lazy(world_size: int) -> bool:
    """Whether a job of this size connects on first use."""
    return world_size >= LAZY_FROM


def connect_lazily(world_size: int) -> dict[str, str | None]:
    """Has all Gloo groups that this process makes from now on, libraries' included, connect on first use, if
    the job is large.

    Returns:
        What the environment was where it has been changed.
    """
    if not is_lazy(world_size) or _LAZY in os.environ:
        return {}
    os.environ[_LAZY] = "1"
    return {_LAZY: None}


def gloo_group(
    store: dist.Store, rank: int, world_size: int, timeout: timedelta, *, lazy: bool
) -> RouterGroup:
    """A Gloo group that torch.distributed does not know as one. Collective over its ranks."""
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [
        dist.ProcessGroupGloo.create_device(interface=name, lazy_init=lazy)
        for name in os.environ.get(INTERFACE, "").split(",")
        if name
    ] or [dist.ProcessGroupGloo.create_default_device(lazy_init=lazy)]
    options._timeout = timeout
    options._threads = 2 * len(options._devices)
    return cast(RouterGroup, dist.ProcessGroupGloo(store, rank, world_size, options))
