"""Runs one program on several inputs, in one sandbox."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence

from copd_megatron.rewards.sandbox import bubblewrap
from copd_megatron.rewards.sandbox.limits import Limits
from copd_megatron.rewards.sandbox.run import Ended, Result, run

_HEAD = re.compile(rb"(\d{1,3}) (\d{1,9})\n")
_BYTES_PER_CHARACTER = 4
"""At the most; the input of a run lies in the scratch folder, where no name leads to it."""
_OUT_OF_TIME = 152
"""As in ``inside.py``."""


def run_batch(program: bytes, inputs: Sequence[str], *, mode: str, limits: Limits) -> list[Result]:
    """Runs a program once for each input: a start of the sandbox costs ten times what the start of a process
    in it does.

    Each run is a process of its own with limits of its own, and finds the scratch folder empty and nothing of
    the others running. They share a sandbox, so a program can leave a message for its next run in the
    kernel's memory (a System V segment, say). It gains nothing: no run knows what is expected of any.

    Args:
        inputs: what the program finds on stdin, or requests of mode ``value``.
        mode: ``program`` or ``value``.
        limits: of each run.

    Returns:
        Results in order; those after the first that ran out of time are missing.

    Raises SandboxError: the sandbox could not be set up.
    """
    if bubblewrap.unsandboxed():
        return _one_by_one(program, inputs, mode, limits)
    task = {
        "mode": mode,
        "seconds": limits.wall_seconds,
        "output_bytes": limits.output_bytes,
        "inputs": list(inputs),
    }
    whole = dataclasses.replace(
        limits,
        wall_seconds=limits.wall_seconds * len(inputs) + 1.0,
        output_bytes=(limits.output_bytes + 100) * len(inputs),
        processes=limits.processes + 1,
        scratch_bytes=limits.scratch_bytes + max(map(len, inputs), default=0) * _BYTES_PER_CHARACTER,
    )
    stdin = json.dumps(task).encode("ascii")
    found = run(program, stdin=stdin, mode="batch", limits=whole)
    return _results(found, limits.output_bytes, len(inputs))


def _one_by_one(program: bytes, inputs: Sequence[str], mode: str, limits: Limits) -> list[Result]:
    """Without a sandbox nothing says which processes a run has left."""
    results: list[Result] = []
    for given in inputs:
        results.append(run(program, stdin=given.encode("utf-8", "replace"), mode=mode, limits=limits))
        if results[-1].ended is Ended.time:
            break
    return results


def _results(found: Result, output_bytes: int, count: int) -> list[Result]:
    """What the first process in the sandbox wrote, taken apart. A program that ended it costs its own run."""
    results: list[Result] = []
    place = 0
    while len(results) < count:
        head = _HEAD.match(found.output, place)
        if head is None:
            results.append(Result(found.ended if found.ended is not Ended.ok else Ended.error, b""))
            break
        status, length = int(head[1]), int(head[2])
        place = head.end() + length
        output = found.output[head.end() : place]
        ended = Ended.ok if status == 0 else Ended.time if status == _OUT_OF_TIME else Ended.error
        if length > output_bytes:
            ended = Ended.output
        results.append(Result(ended, output[:output_bytes]))
        if ended is Ended.time:
            break
    return results
