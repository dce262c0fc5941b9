"""Runs in the sandbox, ahead of the program and in its process. Needs the standard library alone.

``inside.py program LIMITS PATH``: runs the program as a script.
``inside.py command LIMITS PATH``: writes files, runs commands and gives one result; see ``commands.py``.
``inside.py value LIMITS PATH``: reads a request from stdin, runs the program as a module, and writes the
``repr`` of one value to what was stdout; the program's own output goes nowhere. Requests are JSON objects:
``{"function": name, "arguments": [...]}`` (a function, or a method of a class ``Solution``), or
``{"expression": source}``.

Nothing here is secret, and the program may replace all of it: the process knows no expected value, so that
the only way to be graded right is to give the right value.
"""

from __future__ import annotations

import binascii
import json
import os
import resource
import sys
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


def write_all(channel: int, data: bytes) -> None:
    while data:
        data = data[os.write(channel, data) :]


def main() -> None:
    mode, limits, path = sys.argv[1:4]
    with open(path, "rb") as file:
        source = file.read()
    sys.argv[:] = ["program.py"]
    sys.path[:] = [folder for folder in sys.path if folder not in ("", "/", os.path.dirname(path))]
    limit(json.loads(limits))
    {"program": run_program, "value": run_value, "command": run_command}[mode](source)


if __name__ == "__main__":
    main()
