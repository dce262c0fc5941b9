"""A bound on the pixels that all threads of a rank decode at once.

The limit on one image or video bounds the memory of one decoder. With several threads, the largest items
could meet; the budget makes them take turns, so that a rank never holds more decoded pixels than one item may
have. Only the time that decoding takes depends on it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Reserve = Callable[[int], None]
"""Called once, with the number of pixels that are about to be decoded; returns when there is room."""


def unbounded(pixels: int) -> None:
    """The Reserve of a caller that decodes one item at a time."""


class PixelBudget:
    """``limit`` pixels, shared by threads.

    >>> with budget.share() as reserve:                         # doctest: +SKIP
    ...     pixels = decode_image(data, where, max_pixels=limit, reserve=reserve)
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._changed = threading.Condition()
        self._next = threading.Lock()
        """Held by the one thread that waits for room: small items do not overtake a large one for ever."""

    @contextmanager
    def share(self) -> Iterator[Reserve]:
        """Gives a ``Reserve``; what it reserves is free again when the block ends."""
        held = 0

        def reserve(pixels: int) -> None:
            nonlocal held
            assert not held, "a share is reserved at once: a second call could wait for itself"
            with self._next, self._changed:
                self._changed.wait_for(lambda: not self._used or self._used + pixels <= self._limit)
                self._used += pixels
            held = pixels

        try:
            yield reserve
        finally:
            with self._changed:
                self._used -= held
                self._changed.notify_all()
