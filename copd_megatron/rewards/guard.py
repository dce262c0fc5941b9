"""Ends a grading process at the moment in which it is about to run code that a response may have written.

The built-in verifiers parse responses and evaluate none. Should one of them be wrong about that (a new
version of a library, a path that nobody has read), the guard is what stands between the response and the
interpreter: an audit hook sees every ``exec`` and ``eval`` before the first instruction runs, every process
about to be started, every socket and every pickle, and ends the process there. The sample counts as a crash,
and nothing that came after can have been changed.

Let through: modules being imported; code that names nothing but the constructors of numbers, to which sympy's
parser reduces plain arithmetic; and the two places in sympy that run code of sympy's own.
"""

from __future__ import annotations

import os
import sys
from types import CodeType, FrameType
from typing import Any

EXIT_STATUS = 77
"""Exit status of a process that the guard has ended."""

_FORBIDDEN = frozenset(
    {
        *("os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system", "pty.spawn"),
        *("os.kill", "os.killpg", "subprocess.Popen", "socket.__new__", "pickle.find_class", "ctypes.dlopen"),
        *("code.__new__", "sys.setprofile", "sys.settrace"),
    }
)
_OWN_CODE = (
    ("/sympy/polys/monomials.py", "_build"),  # products of monomials, unrolled for a number of variables
    ("/sympy/parsing/sympy_parser.py", "parse_expr"),  # "from sympy import *"; the text runs in eval_expr
)
"""Ends of files and functions in which sympy runs what it has written itself."""
_NUMBERS = frozenset({"Integer", "Float", "Rational", "Add", "Mul", "Pow"})


class Guard:
    """An audit hook that can be switched on and off. One a process: a hook cannot be removed."""

    def __init__(self) -> None:
        self._watching = False
        sys.addaudithook(self._hook)

    def __enter__(self) -> None:
        self._watching = True

    def __exit__(self, *_: object) -> None:
        self._watching = False

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._watching:
            return
        if event == "exec":
            if _is_arithmetic(arguments[0]) or _is_own_code(sys._getframe(1)):
                return
        elif event not in _FORBIDDEN:
            return
        if not _is_importing():
            os._exit(EXIT_STATUS)


def _is_arithmetic(code: object) -> bool:
    """Whether code can do no more than build numbers and combine them."""
    return (
        isinstance(code, CodeType)
        and set(code.co_names) <= _NUMBERS
        and not any(isinstance(constant, CodeType) for constant in code.co_consts)
    )


def _is_own_code(caller: FrameType) -> bool:
    code = caller.f_code
    return any(code.co_filename.endswith(file) and code.co_name == name for file, name in _OWN_CODE)


def _is_importing() -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False
