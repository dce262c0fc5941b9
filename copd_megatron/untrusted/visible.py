"""Text from a file, a model, a message or a user's data, made harmless for a terminal.

A terminal obeys what is printed: escape sequences move the cursor, rewrite earlier lines, change the title or
fill the clipboard, and signs for the direction of writing show a line in another order than it has.
"""

from __future__ import annotations

import html
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


def one_line(text: str, limit: int = 120) -> str:
    """As ``visible``, with line breaks and tabs written as ``\\n`` and ``\\t``, and cut after ``limit``
    characters: what stands in a table's cell must not look like another row."""
    shown = visible(text[:limit]).replace("\n", "\\n").replace("\t", "\\t")
    return shown if len(text) <= limit and len(shown) <= limit else f"{shown[: limit - 3]}..."


def markdown_cell(text: str, limit: int = 120) -> str:
    """As ``one_line``, for a cell of a Markdown table: no HTML, no link, no end of the cell."""
    shown = html.escape(one_line(text, limit), quote=False)
    return shown.replace("|", "&#124;").replace("](", "]&#40;").replace("`", "&#96;")


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
