"""Output to a terminal or a pipe: harmless, and as long as somebody reads it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from copd_megatron.untrusted.visible import visible


def say(text: object = "", *, file: TextIO | None = None, end: str = "\n", flush: bool = False) -> None:
    """Prints text, whoever wrote parts of it: control characters are shown, not sent to the terminal."""
    print(visible(str(text)), file=file, end=end, flush=flush)


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """Around printing alone: a reader that has seen enough (``| head``) ends the output, not the command."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # what is still buffered goes nowhere, or Python complains when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
