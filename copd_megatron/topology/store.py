"""The job's store, and the network that a job uses: the address that its store listens on, and the interface
that its ranks reach each other through.

torch's ``TCPStore`` listens on every interface of the machine and asks nobody for a password, and whoever can
write to it can end a run or worse. It accepts a socket of ours instead, bound to one address.
"""

from __future__ import annotations

import ipaddress
import logging
import queue
import socket
import threading
from datetime import timedelta
from typing import Any

import psutil
import torch.distributed as dist

from copd_megatron.untrusted.visible import visible

logger = logging.getLogger(__name__)

_ANSWER_SECONDS = 5.0
"""For the first answer, beyond what connecting may take."""

_MAX_TEXT_BYTES = 4096
_BACKLOG = 2048
"""Ranks that may connect at the same moment."""
_Address = tuple[Any, ...]


def serve_store(host: str, port: int, timeout: timedelta) -> dist.TCPStore:
    """Serves a store at ``host``:``port`` and connects to it.

    Args:
        host: name or address of this machine; the store listens on that address alone.
        port: 0 for any free one, which the store's ``port`` tells.

    Raises:
        OSError: the name belongs to no address of this machine, or the port is taken.
        RuntimeError: torch could not serve it.
    """
    family, address = _listen_on(host, port)
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
    listener.detach()  # the store owns it now
    return store


def reach_store(host: str, port: int, timeout: timedelta) -> dist.TCPStore:
    """Connects to a store that another process serves.

    torch waits for ever for the first answer of what listens there. A thread of its own does the waiting, and
    is left behind where none comes.

    Raises:
        OSError: nothing answers as a store in time.
        RuntimeError: torch could not connect.
    """
    found: queue.SimpleQueue[dist.TCPStore | Exception] = queue.SimpleQueue()

    def connect() -> None:
        try:
            found.put(dist.TCPStore(host, port, None, False, timeout, wait_for_workers=False))
        except Exception as error:  # raised below, in the thread that asked
            found.put(error)

    threading.Thread(target=connect, name="reach the store", daemon=True).start()
    limit = 2 * timeout.total_seconds() + _ANSWER_SECONDS
    try:
        store = found.get(timeout=limit)
    except queue.Empty:
        raise TimeoutError(f"what listens there has not answered as a store for {limit:.0f} s") from None
    if isinstance(store, Exception):
        raise store
    return store


def text_of(value: bytes) -> str:
    """A value of the store as text to be shown. Whoever reaches the store may have written it: what is no
    text is shown as far as it is one, and not without end."""
    return visible(value[:_MAX_TEXT_BYTES].decode("utf-8", "replace"))


def interface_to(host: str) -> str | None:
    """The interface through which this machine reaches ``host``; None where that is unknown.

    It is unknown on a machine that takes its own name for a loopback address, as Debian does: the other
    machines reach it through another interface.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing, but chooses the way
            mine = probe.getsockname()[0]
    except OSError:
        return None
    if _is_loopback(mine) and not _means_loopback(host):
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address == mine for one in addresses):
            return name
    return None


def _listen_on(host: str, port: int) -> tuple[socket.AddressFamily, _Address]:
    """The address to bind: the one that other machines know ``host`` by."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for family, _, _, _, address in found:
        if _means_loopback(host) or not _is_loopback(str(address[0])):
            return family, address
    logger.warning(
        "this machine takes %s for itself (%s, see /etc/hosts), which no other machine can reach: the job's "
        "store listens on all interfaces; set MASTER_ADDR to the address of rank 0's machine",
        host, found[0][4][0],
    )  # fmt: skip
    return socket.AF_INET, ("", port)


def _means_loopback(host: str) -> bool:
    """Whether ``host`` means this machine alone, whoever asks."""
    return host == "localhost" or _is_loopback(host)


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:  # a name
        return False
