"""A store that listens on one address only.

torch's ``TCPStore`` listens on every interface of the machine and asks nobody for a password, and whoever can
write to it can end a run or worse. It takes a socket of ours instead, bound to the address that the ranks
connect to.
"""

from __future__ import annotations

import socket
from datetime import timedelta

import torch.distributed as dist

_BACKLOG = 2048
"""Ranks that may connect at the same moment."""


def serve_store(host: str, port: int, timeout: timedelta) -> dist.TCPStore:
    """Serves a store at ``host``:``port`` and connects to it.

    Args:
        host: name or address of this machine; the address it stands for is the only one that is listened on.
        port: 0: any free one, to be read from the store's ``port``.

    Raises:
        OSError: the name stands for no address of this machine, or the port is taken.
        RuntimeError: torch could not serve it.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
        store = dist.TCPStore(
            host,
            listener.getsockname()[1],
            None,
            True,
            timeout,
            wait_for_workers=False,
            master_listen_fd=listener.fileno(),
        )
    except BaseException:
        listener.close()
        raise
    listener.detach()  # the store's from here on
    return store
