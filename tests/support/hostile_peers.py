"""What another user of this machine may do over TCP: find the sockets that a job listens on, on the loopback
address alone, and connect. Bounded in number and time."""

from __future__ import annotations

import os
import pickle
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil

_LOOPBACK = "127.0.0.1"
_STORE_GREETING = b"\x00" + struct.pack("<I", 0x3C85F7CE)
"""Validates a client of TCPStore."""
_EACH = 4
"""Connections of a kind to a socket."""


def listening_ports(process: int) -> set[int]:
    """Of a process and its descendants, on the loopback address."""
    found: set[int] = set()
    try:
        tree = [psutil.Process(process), *psutil.Process(process).children(recursive=True)]
    except psutil.NoSuchProcess:
        return found
    for one in tree:
        try:
            connections = one.net_connections("tcp")
        except psutil.Error:  # ended meanwhile
            continue
        found.update(c.laddr.port for c in connections if c.status == "LISTEN" and c.laddr.ip == _LOOPBACK)
    return found


def _messages(draw: random.Random) -> dict[str, bytes]:
    """What a peer sends, by kind."""
    return {
        "nothing": b"",
        "garbage": draw.randbytes(1 << 16),
        "one byte": draw.randbytes(1),
        "zeros": bytes(4096),
        "a length of 2^64 - 1": b"\xff" * 16,
        "a length of 2^40": struct.pack("<Q", 2**40) + b"x" * 100,
        "a length of 2^31 - 1": struct.pack("<I", 2**31 - 1) + b"x" * 100,
        "a key of 2^62 bytes": _STORE_GREETING + b"\x02" + struct.pack("<Q", 2**62) + b"key",
        "a key that nobody sets": _STORE_GREETING + b"\x02" + struct.pack("<Q", 3) + b"abc",
        "an unknown question": _STORE_GREETING + b"\xfe" * 64,
        "half a request": b"GET /metrics HTTP/1.1\r\nHost: x\r\n",
        "requests without listening": b"GET /metrics HTTP/1.1\r\n\r\n" * 200,
    }


class Strangers:
    """Peers that know nothing of what listens there."""

    def __init__(self, seed: int = 1) -> None:
        self._draw = random.Random(seed)
        self._held: list[socket.socket] = []
        self.reached: Counter[str] = Counter()
        """Connections by kind."""
        self._sent: Counter[tuple[int, str]] = Counter()

    def attack(self, process: int) -> None:
        """Goes once over all sockets."""
        for port in listening_ports(process):
            for kind, message in _messages(self._draw).items():
                if self._sent[port, kind] < _EACH:
                    self._sent[port, kind] += 1
                    self._connect(port, kind, message)

    def _connect(self, port: int, kind: str, message: bytes) -> None:
        try:
            peer = socket.create_connection((_LOOPBACK, port), timeout=1.0)
        except OSError:  # closed meanwhile
            return
        self.reached[kind] += 1
        try:
            peer.sendall(message)
        except OSError:
            peer.close()
            return
        if self._sent[port, kind] % 2 and len(self._held) < 400:
            self._held.append(peer)  # stays, and reads nothing
        else:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            peer.close()  # resets

    def leave(self) -> None:
        """Ends all connections."""
        for peer in self._held:
            peer.close()


class Program:
    """An object whose pickle makes a file."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, (f"touch {self._marker}",)


def forge_store(process: int, value: bytes, wanted: Callable[[str], bool], seconds: float) -> Counter[str]:
    """Overwrites the values of a job's store, again and again; counts by key what it has written."""
    import torch.distributed as dist

    written: Counter[str] = Counter()
    end, store = time.monotonic() + seconds, None
    while time.monotonic() < end and psutil.pid_exists(process):
        try:
            if store is None:
                served = [
                    c.laddr.port
                    for c in psutil.Process(process).net_connections("tcp")
                    if c.status == "LISTEN"
                ]
                if not served:
                    time.sleep(0.05)
                    continue
                limit = timedelta(seconds=5)
                store = dist.TCPStore(_LOOPBACK, served[0], None, False, limit, wait_for_workers=False)
            for key in filter(wanted, store.list_keys()):
                store.set(key, value)
                written[key] += 1
        except (dist.DistError, psutil.Error, RuntimeError):  # the job has ended
            return written
        time.sleep(0.05)
    return written


def pickled_program(marker: Path) -> bytes:
    """A pickle that makes a file when it is loaded."""
    return pickle.dumps(Program(marker))
