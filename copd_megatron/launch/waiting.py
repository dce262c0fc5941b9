"""Tells the person who watches a run that something which takes long still goes on. Imports no torch."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0


@contextlib.contextmanager
def waiting(what: str, *, every: float = SECONDS_BETWEEN_LINES) -> Iterator[None]:
    """While the block runs, a line of the log every ten seconds: ``starting vLLM: 20 s so far``.

    Args:
        what: goes on in the block.
        every: seconds between two lines.
    """
    ended, began = threading.Event(), time.monotonic()

    def tell() -> None:
        while not ended.wait(every):
            logger.info("%s: %.0f s so far", what, time.monotonic() - began)

    thread = threading.Thread(target=tell, name="copd-waiting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class Countdown:
    """Lines of the log with a count and an estimate: ``base on image: 80 of 150 responses, 12 s to go``."""

    def __init__(
        self,
        what: str,
        total: int,
        *,
        every: float = SECONDS_BETWEEN_LINES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            total: how often ``add`` will be called.
            every: seconds between two lines.
            clock: in seconds.
        """
        self._what, self._total, self._every, self._clock = what, total, every, clock
        self._began = self._told = clock()
        self._done = 0

    def add(self) -> None:
        """One more is done."""
        self._done += 1
        now = self._clock()
        if now - self._told < self._every or self._done >= self._total:
            return
        self._told = now
        to_go = (now - self._began) / self._done * (self._total - self._done)
        logger.info("%s: %d of %d responses, %.0f s to go", self._what, self._done, self._total, to_go)
