"""Text from a file, a model, a message or a user's data, made harmless for a terminal.

A terminal obeys what is printed: escape sequences move the cursor, rewrite earlier lines, change the title or
fill the clipboard, and signs for the direction of writing show a line in another order than it has.
"""

from __future__ import annotations

import re
import sys
import threading
import traceback
from types import TracebackType

_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def visible(text: str) -> str:
    """Text whose control characters, line breaks and tabs apart, are written as ``\\x1b``. Halves of
    surrogate pairs, which no terminal can be sent, are written as ``\\udc80``."""
    return _CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


def visible_json(text: str) -> str:
    """JSON of equal value without control characters: they stand in strings only, and are escaped there."""
    return _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What Python prints for an exception that nobody catches; its message may quote what was read."""
    sys.stderr.write(visible("".join(traceback.format_exception(kind, error, trace))))
    sys.stderr.flush()


def show_tracebacks_visibly() -> None:
    """From now on, exceptions that end this process or one of its threads are printed harmlessly, unless
    somebody else has taken charge of them."""

    def of_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_type is SystemExit:
            return
        name = args.thread.name if args.thread is not None else "unknown"
        error = args.exc_type() if args.exc_value is None else args.exc_value
        sys.stderr.write(f"Exception in thread {visible(name)}:\n")
        show_traceback(args.exc_type, error, args.exc_traceback)

    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = show_traceback
    if threading.excepthook is threading.__excepthook__:
        threading.excepthook = of_thread
