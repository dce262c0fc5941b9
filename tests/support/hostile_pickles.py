"""Pickles that run something when they are loaded, in all the ways that pickle has for it."""

from __future__ import annotations

import builtins
import functools
import io
import operator
import os
import pickle
import posixpath
import subprocess
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import Metadata


class _Calls:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._call


class _State:
    """Pickles as a call, and another with what comes out: ``__setstate__`` of an object of the file's."""

    def __init__(self, make: Callable[..., Any], arguments: tuple[Any, ...], state: Any) -> None:
        self._reduced = make, arguments, state

    def __reduce__(self) -> Any:
        return self._reduced


def _by_opcodes(marker: Path) -> bytes:
    """Protocol 0, written by hand: what no class has to exist for."""
    return f"cposix\nsystem\n(S'touch {marker}'\ntR.".encode()


def _dotted(marker: Path) -> bytes:
    """An allowed module, and a name in it that leads out of it."""
    name, argument = b"serialization.os.system", f"touch {marker}".encode()
    return (
        b"\x80\x04\x8c\x05torch\x8c" + bytes([len(name)]) + name + b"\x93"
        + b"\x8c" + bytes([len(argument)]) + argument + b"\x85R."
    )  # fmt: skip


def programs(marker: Path) -> dict[str, Any]:
    """Objects whose pickles touch ``marker`` when they are loaded without care, by what they use."""
    shell, python = f"touch {marker}", f"__import__('pathlib').Path({str(marker)!r}).touch()"
    system = _Calls(builtins.__import__, "os")
    inner = pickle.dumps(_Calls(os.system, shell))
    saved = io.BytesIO()
    torch.save(_Calls(os.system, shell), saved)
    return {
        "os.system": _Calls(os.system, shell),
        "eval": _Calls(eval, python),
        "exec": _Calls(exec, python),
        "Popen": _Calls(subprocess.Popen, ["touch", str(marker)]),
        "getattr": _Calls(getattr, system, "system"),
        "import": _Calls(builtins.__import__, "antigravity"),
        "partial": _Calls(functools.partial, os.system, shell),
        "attrgetter": _Calls(operator.attrgetter("system"), system),
        "nested pickle": _Calls(pickle.loads, inner),
        "torch's nested loader": _Calls(torch.storage._load_from_bytes, saved.getvalue()),
        "torch.load": _Calls(torch.load, "/dev/null"),
        "numpy's reconstruct": _State(
            np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), _Calls(os.system, shell)
        ),
        "torch's rebuild": _Calls(torch._utils._rebuild_tensor_v2, _Calls(os.system, shell), 0, (1,), (1,)),
        "a path's method": _Calls(Path.touch, marker),
        "a module's function": _Calls(posixpath.expanduser, "~"),
        "in a list": [1, [2, [_Calls(os.system, shell)]]],
        "in a dict's key": {("a", _Calls(os.system, shell)): 1},
        "in an ordered dict": OrderedDict(a=_Calls(os.system, shell)),
        "in a dataclass": Metadata(state_dict_metadata={}, planner_data=_Calls(os.system, shell)),
        "in a good one's storage": Metadata(state_dict_metadata={}, storage_data={"a": _Calls(eval, python)}),
        "as state": _State(Metadata, ({},), _Calls(os.system, shell)),
    }


def pickled_programs(marker: Path) -> dict[str, bytes]:
    """The same as bytes, and some that no object makes."""
    found = {}
    for name, program in programs(marker).items():
        for protocol in (0, 2, 5):
            found[f"{name}, protocol {protocol}"] = pickle.dumps(program, protocol=protocol)
    return {**found, "by opcodes": _by_opcodes(marker), "a dotted name": _dotted(marker)}
