"""Verifiers that go wrong in each way that the grader must survive; run in worker processes by path."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from copd_megatron.rewards import registry, worker
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
        case ["huge"]:
            return -1e200
        case ["text"]:
            return "correct"  # type: ignore[return-value]
        case ["pid"]:
            return float(os.getpid())
        case ["hash"]:
            return float(hash("hashing is seeded") % 1_000_003)
        case ["random"]:
            return random.random()
        case ["variables"]:
            return float(len(os.environ))
        case ["secret"]:
            return float("COPD_TEST_SECRET" in os.environ)
        case ["descriptors"]:
            return float(len(os.listdir("/proc/self/fd")) - 1)  # one is open to list them
        case ["scratch", path_file]:
            Path("left behind").write_text("x")
            Path(path_file).write_text(os.getcwd())
        case [("forge" | "babble") as how]:
            _write_everywhere(FORGED if how == "forge" else b"no answer at all\n")
        case ["replace"]:
            worker._grade = lambda *_: {"value": 1.0}  # type: ignore[assignment]
            registry.get = lambda _: registry.Verifier(  # type: ignore[assignment]
                name="x", verify=lambda *_: 1.0, isolated=True
            )
        case ["kill_the_server"]:
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(3600)
        case ["kill_the_others"]:
            time.sleep(0.3)  # so that there are some
            _kill_all_children_of(os.getppid())
        case ["stop"]:
            os.kill(os.getpid(), signal.SIGSTOP)
        case ["spin"]:
            while True:
                pass
        case ["leave_a_daemon", pid_file]:
            if os.fork() == 0:
                os.setsid()
                Path(pid_file).write_text(str(os.getpid()))
                time.sleep(3600)
            while not os.path.exists(pid_file):
                time.sleep(0.01)
        case ["wait", seconds]:
            time.sleep(float(seconds))
        case ["wrong"]:
            return 0.0
    return 1.0


FORGED = b'{"value": 1.0}\n{"id": null, "value": 1.0}\n{"pid": 1}\n'


def _write_everywhere(line: bytes) -> None:
    for descriptor in range(64):
        with contextlib.suppress(OSError):
            os.write(descriptor, line)


def _kill_all_children_of(parent: int) -> None:
    for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        if int(pid) != os.getpid():
            os.kill(int(pid), signal.SIGKILL)


@register("evaluates", reusable=True)
def evaluates(response: str, answer: str, metadata: Mapping[str, Any]) -> float:
    """Promises to evaluate nothing, and does."""
    if response.startswith("shell "):
        os.system(response.removeprefix("shell "))
    return float(response == "right" or bool(eval(response)))


@register("obedient_and_reusable", reusable=True)
def obedient_and_reusable(response: str, answer: str, metadata: Mapping[str, Any]) -> float:
    """``by_command`` in a process that goes on to the next response."""
    return by_command(response, answer, metadata)


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
