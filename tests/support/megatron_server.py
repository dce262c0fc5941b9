"""A process that has imported Megatron and vLLM, and forks the ranks of launches from there.

These imports take a process about 20 seconds of CPU. This one pays them once; its ranks pay nothing. It
starts with the first launch that asks for it and ends with the process that asked.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import multiprocessing
import signal
import sys
from multiprocessing.connection import Connection
from typing import NoReturn

from tests.support.ranks import Ended, Launch, run_ranks

MODULES = (
    "copd_megatron.policy.actor",
    "copd_megatron.checkpoint.actor_state",
    "copd_megatron.train",
    "vllm.entrypoints.llm",
)


class MegatronServer:
    """Our end of the process."""

    def __init__(self) -> None:
        self._requests, theirs = multiprocessing.Pipe()
        # From the fork server, whose processes have none of pytest's state.
        self._process = multiprocessing.get_context("forkserver").Process(target=_serve, args=(theirs,))
        self._process.start()
        theirs.close()
        atexit.register(self.close)

    def run_ranks(self, launch: Launch) -> list[Ended]:
        """As ``ranks.run_ranks``; whatever interrupts it ends the server and its ranks."""
        try:
            self._requests.send(launch)
            ended: list[Ended] = self._requests.recv()
        except EOFError as error:
            self.close()
            raise RuntimeError("the Megatron server ended; its output above says why") from error
        except BaseException:
            self.close()
            raise
        return ended

    @property
    def is_alive(self) -> bool:
        return self._process.is_alive()

    def close(self) -> None:
        self._requests.close()
        self._process.terminate()
        self._process.join()


def _serve(requests: Connection) -> None:
    signal.signal(signal.SIGTERM, _exit)  # so that run_ranks kills what it has started
    for module in MODULES:
        importlib.import_module(module)
    fork = multiprocessing.get_context("fork")
    with contextlib.suppress(EOFError):  # the process that asked is gone
        while True:
            requests.send(run_ranks(fork, requests.recv()))


def _exit(*args: object) -> NoReturn:
    sys.exit(1)


_server: MegatronServer | None = None


def megatron_server() -> MegatronServer:
    """This process's server, started when there is none."""
    global _server
    if _server is None or not _server.is_alive:
        _server = MegatronServer()
    return _server
