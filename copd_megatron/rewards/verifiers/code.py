"""``code``: a Python program, run against test cases in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from copd_megatron.rewards import sandbox
from copd_megatron.rewards.code_cases import (
    Case,
    Output,
    Truth,
    read_cases,
    read_value,
    same_output,
    same_value,
)
from copd_megatron.rewards.fenced import last_block
from copd_megatron.rewards.metadata import setting
from copd_megatron.rewards.registry import register

_BATCH = 25
"""Cases that share a sandbox."""
_PYTHON = frozenset({"", "python", "python3", "py"})


@register("code", gold_is_a_response=False, requires=sandbox.require)
def code(response: str, answer: str, metadata: Mapping[str, Any]) -> float:
    """1.0 if the last Python block of the response passes all cases of the sample.

    Every case runs in a process of its own in a sandbox (``rewards/sandbox``), which gets the input and never
    the expected result: that is compared here. The first case has a sandbox of its own, since most wrong
    programs fail there; later ones share theirs with up to 24 others (``sandbox.run_batch``). A program
    passes a case if it ends with status 0 within its limits and gives the expected output or value.

    ``answer``, or metadata ``tests``: the cases as JSON, see ``code_cases.read_cases``. metadata: ``partial``
    (default false; true: the share of cases passed), ``tolerance`` (1e-6, relative and absolute, for
    floating-point numbers), ``time_limit`` (CPU seconds per case, 4, plus as much again for a busy machine).
    The first case that runs out of time ends the grading, and the rest count as failed.

    An assert that only asks for truth (``assert f(x)``) tells the program what is expected: a function that
    returns True passes it. Prefer literals.

    Raises ValueError for tests that cannot be read, SandboxError and ConfigError where the sandbox fails.
    """
    cases = read_cases(answer, metadata)
    program = last_program(response)
    if program is None:
        return 0.0
    sandbox.require()
    limit = float(setting(metadata, "time_limit", 4.0))
    limits = sandbox.Limits(cpu_seconds=limit, wall_seconds=2 * limit)
    tolerance = float(setting(metadata, "tolerance", 1e-6))
    partial = bool(setting(metadata, "partial", False))
    passed = 0
    for start in (0, *range(1, len(cases), _BATCH)):
        batch = cases[start : start + _BATCH] if start else cases[:1]
        results = _run(program, batch, limits)
        good = [
            result.ended is sandbox.Ended.ok and _is_right(result.output, case, tolerance)
            for result, case in zip(results, batch, strict=False)
        ]
        passed += sum(good)
        is_out_of_time = any(result.ended is sandbox.Ended.time for result in results)
        if (not partial and not all(good)) or is_out_of_time or len(good) < len(batch):
            break
    return passed / len(cases) if partial else float(passed == len(cases))


def last_program(response: str) -> str | None:
    """The last closed fenced block of Python, or of no language, after the thinking; None without one."""
    return last_block(response, _PYTHON)


def _run(program: str, cases: Sequence[Case], limits: sandbox.Limits) -> list[sandbox.Result]:
    """Results of the cases, in order; fewer where one runs out of time. All are of one mode, unless
    a sample mixes them, which its layouts do not."""
    source = program.encode("utf-8", "replace")
    mode = "program" if isinstance(cases[0], Output) else "value"
    inputs = [case.stdin if isinstance(case, Output) else json.dumps(case.request) for case in cases]
    if len(inputs) == 1:
        stdin = inputs[0].encode("utf-8", "replace")
        return [sandbox.run(source, stdin=stdin, mode=mode, limits=limits)]
    return sandbox.run_batch(source, inputs, mode=mode, limits=limits)


def _is_right(output: bytes, case: Case, tolerance: float) -> bool:
    if isinstance(case, Output):
        return same_output(output.decode("utf-8", "replace"), case.expected, tolerance)
    is_value, value = read_value(output)
    if not is_value:
        return False
    if isinstance(case, Truth):
        return bool(value) is case.expected
    return same_value(value, case.expected, tolerance, exact=case.exact)
