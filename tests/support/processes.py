"""Waiting for processes to be gone."""

from __future__ import annotations

import time
from pathlib import Path


def is_alive(pid: str) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def is_gone(pid: str, within_seconds: float = 10.0) -> bool:
    """Whether the process ends within so many seconds."""
    deadline = time.monotonic() + within_seconds
    while is_alive(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
