"""What a grading process does: one request a line, one answer a line, until its socket closes.

``fork_server.py`` forks it, with the verifiers imported. Requests and answers are JSON objects:

``{"id": ..., "target": ..., "guarded": ..., "response": ..., "answer": ..., "metadata": {...}}``
-> ``{"id": ..., "value": 1.0}`` or ``{"id": ..., "error": "ValueError: ..."}``

The id is random and comes back with the answer, so that no answer can be taken for that of another request.
"""

from __future__ import annotations

import json
import os
import random
import resource
import socket
import sys
from pathlib import Path
from typing import Any

from copd_megatron.rewards import registry
from copd_megatron.rewards.guard import Guard

MAX_DATA_BYTES = 2 * 2**30
"""A verifier that asks for more memory gets a MemoryError and its sample scores 0."""
MAX_FILE_BYTES = 64 * 2**20
"""Largest file that a verifier can write into its scratch folder."""
MAX_OPEN_FILES = 256


def prepare_process(folder: Path) -> None:
    """Gives a process that has just been forked its limits, its scratch folder and nothing to print to."""
    os.chdir(folder)
    os.environ.update(HOME=str(folder), TMPDIR=str(folder))
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    os.close(nowhere)
    for what, limit in (
        (resource.RLIMIT_DATA, MAX_DATA_BYTES),
        (resource.RLIMIT_FSIZE, MAX_FILE_BYTES),
        (resource.RLIMIT_NOFILE, MAX_OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(what)
        lower = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(what, (lower, lower))


def serve(channel: socket.socket) -> None:
    """Grades what comes in, one request after the other."""
    guard: Guard | None = None
    with channel.makefile("rb") as requests:
        for line in requests:
            request = json.loads(line)
            if request["guarded"] and guard is None:
                guard = Guard()
            answer = _grade(request, guard if request["guarded"] else None)
            channel.sendall(json.dumps({"id": request["id"], **answer}).encode("ascii") + b"\n")


def _grade(request: dict[str, Any], guard: Guard | None) -> dict[str, Any]:
    try:
        verify = registry.get(request["target"]).verify
        _seed()
        if guard is None:
            return {"value": float(verify(request["response"], request["answer"], request["metadata"]))}
        with guard:
            return {"value": float(verify(request["response"], request["answer"], request["metadata"]))}
    except (Exception, SystemExit) as error:  # whatever a verifier raises is its sample's failure, reported
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def _seed() -> None:
    """Same response, same grade: libraries that try random points begin at the same ones."""
    random.seed(0)
    if numpy_random := sys.modules.get("numpy.random"):
        numpy_random.seed(0)
    if sympy_random := sys.modules.get("sympy.core.random"):
        sympy_random.seed(0)
