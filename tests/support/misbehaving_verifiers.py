"""Verifiers that go wrong in each way that the grader must survive; run in worker processes by path."""

from __future__ import annotations

import ctypes
import os
import subprocess
import time
from collections.abc import Mapping
from typing import Any

from copd_megatron.rewards.registry import register


def by_command(response: str, answer: str, metadata: Mapping[str, Any]) -> float:
    """Does what the response says."""
    match response.split():
        case ["raise"]:
            raise RuntimeError("as told")
        case ["hang"]:
            time.sleep(3600)
        case ["hang_in_c"]:
            ctypes.CDLL(None).pause()
        case ["spawn_and_hang", pid_file]:
            child = subprocess.Popen(["sleep", "3600"])
            with open(pid_file, "w") as file:
                file.write(str(child.pid))
            time.sleep(3600)
        case ["exit"]:
            raise SystemExit(3)
        case ["die"]:
            os.abort()
        case ["eat_memory"]:
            bytearray(1 << 40)
        case ["print"]:
            print("this must not reach the answers")
        case ["nan"]:
            return float("nan")
        case ["text"]:
            return "correct"  # type: ignore[return-value]
        case ["pid"]:
            return float(os.getpid())
        case ["hash"]:
            return float(hash("hashing is seeded"))
    return 1.0


@register("inline_raiser", isolated=False)
def inline_raiser(response: str, answer: str, metadata: Mapping[str, Any]) -> float:
    """Fails in the grader's own process."""
    raise KeyError(response)


def half_a_mark(response: str, answer: str, metadata: Mapping[str, Any]) -> float:
    """Does not misbehave, but never gives more."""
    return 0.5


def needs_what_is_missing(response: str, answer: str, metadata: Mapping[str, Any]) -> float:
    """Grades fine; see ``prepare`` in the registration below."""
    return 1.0


def _prepare_badly() -> None:
    raise ImportError("no such library here")


register("unpreparable", prepare=_prepare_badly)(needs_what_is_missing)
