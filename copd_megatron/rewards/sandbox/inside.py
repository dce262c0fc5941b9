"""Runs in the sandbox, ahead of the program and in its process. Needs the standard library alone.

``inside.py program LIMITS PATH``: runs the program as a script.
``inside.py command LIMITS PATH``: writes files, runs commands and gives one result; see ``commands.py``.
``inside.py value LIMITS PATH``: reads a request from stdin, runs the program as a module, and writes the
``repr`` of one value to what was stdout; the program's own output goes nowhere. Requests are JSON objects:
``{"function": name, "arguments": [...]}`` (a function, or a method of a class ``Solution``), or
``{"expression": source}``.
``inside.py batch LIMITS PATH``: reads ``{"mode": ..., "seconds": ..., "output_bytes": ..., "inputs": [...]}``
from stdin and runs the program once for each input, each time in a process of its own and an empty folder.
Writes a line ``STATUS LENGTH`` and the output for each; ends behind the first that runs out of time.

Nothing here is secret, and the program may replace all of it: the process knows no expected value, so that
the only way to be graded right is to give the right value.
"""

from __future__ import annotations

import binascii
import contextlib
import json
import os
import resource
import select
import sys
import time
import types

TYPE_CHECKING = False
if TYPE_CHECKING:  # the typing module takes milliseconds to import
    from typing import Any

PLAIN = (type(None), bool, int, float, complex, str, bytes)
CONTAINERS = (list, tuple, set, frozenset, dict)


def limit(limits: dict[str, int]) -> None:
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, name), (value, value))


def is_plain(value: Any, depth: int = 0) -> bool:
    """Whether ``ast.literal_eval`` can read the value's repr."""
    kind = type(value)
    if kind in PLAIN:
        return True
    if kind not in CONTAINERS or depth > 50:
        return False
    items = list(value.items()) if kind is dict else value
    return all(is_plain(item, depth + 1) for item in items)


def find(names: dict[str, Any], function: str) -> Any:
    if "Solution" in names and hasattr(names["Solution"], function):
        return getattr(names["Solution"](), function)
    return names[function]


def run_program(source: bytes) -> None:
    names = sys.modules["__main__"].__dict__
    for name in [name for name in names if not name.startswith("__")]:
        del names[name]
    exec(compile(source, "program.py", "exec"), names)


def run_value(source: bytes) -> None:
    request = json.loads(sys.stdin.buffer.read())
    channel = os.dup(1)
    nowhere = os.open("/dev/null", os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    module = types.ModuleType("program")
    sys.modules["program"] = module
    names = module.__dict__
    exec(compile(source, "program.py", "exec"), names)
    if "expression" in request:
        value = eval(compile(request["expression"], "expression", "eval"), names)
    else:
        value = find(names, request["function"])(*request["arguments"])
    if not is_plain(value):
        sys.exit(3)
    write_all(channel, repr(value).encode("utf-8"))


def run_command(source: bytes) -> None:
    task = json.loads(source)
    for name, data in task["files"].items():
        with open(name, "wb") as file:
            file.write(binascii.a2b_base64(data))
    nowhere = os.open("/dev/null", os.O_RDWR)
    actions = [(os.POSIX_SPAWN_DUP2, nowhere, number) for number in ((0, 1, 2) if task["give"] else (0, 2))]
    for command in task["commands"]:
        child = os.posix_spawn(command[0], command, task["environment"], file_actions=actions)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status != 0:
            sys.exit(status if status > 0 else 128 - status)
    if task["give"]:
        with open(task["give"], "rb") as file:
            write_all(1, file.read())


def run_batch(source: bytes, limits: dict[str, int]) -> None:
    """Returns in the processes that have run the program, and in the first one at the end."""
    if os.getpid() != 2 or sys.argv[0] != "/inside.py":
        sys.exit("not in a sandbox, where all other processes must not be ended")
    task = json.loads(read_all(0))
    for given in task["inputs"]:
        stdin = os.open(".", os.O_TMPFILE | os.O_RDWR)
        write_all(stdin, given.encode("utf-8"))
        os.lseek(stdin, 0, os.SEEK_SET)
        end, start = os.pipe()
        child = os.fork()
        if child == 0:
            os.dup2(stdin, 0)
            os.dup2(start, 1)
            os.closerange(3, 64)
            os.setsid()
            limit(limits)
            sys.argv[:] = ["program.py"]
            (run_program if task["mode"] == "program" else run_value)(source)
            return
        os.close(stdin)
        os.close(start)
        deadline = time.monotonic() + task["seconds"]
        output = follow(end, deadline, task["output_bytes"])
        os.close(end)
        status = settle(child, 0.0 if output is None else deadline)
        output = output or b""
        write_all(1, b"%d %d\n" % (status, len(output)) + output)
        if status == OUT_OF_TIME:
            return
        empty(".")


OUT_OF_TIME = 152
"""128 + SIGXCPU, as a shell reports it."""


def follow(channel: int, deadline: float, most: int) -> bytes | None:
    """What a process writes until it closes its end, one byte more than ``most`` at the longest; None where
    the time is up first."""
    output = bytearray()
    while len(output) <= most:
        remaining = deadline - time.monotonic()
        if remaining <= 0 or not select.select([channel], [], [], remaining)[0]:
            return None
        data = os.read(channel, 65536)
        if not data:
            break
        output += data
    return bytes(output[: most + 1])


def settle(child: int, deadline: float) -> int:
    """Waits for a process until the deadline, and ends it with all others that it has left."""
    end = os.pidfd_open(child)
    in_time = bool(select.select([end], [], [], max(0.0, deadline - time.monotonic()))[0])
    os.close(end)
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, 9)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if not in_time or status in (-9, -24):
        return OUT_OF_TIME
    return status if status >= 0 else 128 - status


def empty(folder: str) -> None:
    """Removes what a program has left, so that the next one finds nothing."""
    os.chmod(folder, 0o700)
    for entry in list(os.scandir(folder)):
        if entry.is_dir(follow_symlinks=False):
            empty(entry.path)
            os.rmdir(entry.path)
        else:
            os.unlink(entry.path)


def read_all(channel: int) -> bytes:
    data = bytearray()
    while piece := os.read(channel, 1 << 20):
        data += piece
    return bytes(data)


def write_all(channel: int, data: bytes) -> None:
    while data:
        data = data[os.write(channel, data) :]


def main() -> None:
    mode, limits, path = sys.argv[1:4]
    with open(path, "rb") as file:
        source = file.read()
    sys.path[:] = [folder for folder in sys.path if folder not in ("", "/", os.path.dirname(path))]
    if mode == "batch":
        return run_batch(source, json.loads(limits))
    limit(json.loads(limits))
    sys.argv[:] = ["program.py"]
    {"program": run_program, "value": run_value, "command": run_command}[mode](source)


if __name__ == "__main__":
    main()
