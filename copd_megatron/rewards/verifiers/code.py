"""``code``: a Python program, run against test cases in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping
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

_PYTHON = frozenset({"", "python", "python3", "py"})


@register("code", gold_is_a_response=False, requires=sandbox.require)
def code(response: str, answer: str, metadata: Mapping[str, Any]) -> float:
    """1.0 if the last Python block of the response passes all cases of the sample.

    Every case runs in a process and a sandbox of its own (``rewards/sandbox``), which gets the input and
    never the expected result: that is compared here. A program passes a case if it ends with status 0
    within its limits and gives the expected output or value.

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
    for case in cases:
        result = _run(program, case, limits)
        good = result.ended is sandbox.Ended.ok and _is_right(result.output, case, tolerance)
        passed += good
        if not good and (not partial or result.ended is sandbox.Ended.time):
            break
    return passed / len(cases) if partial else float(passed == len(cases))


def last_program(response: str) -> str | None:
    """The last closed fenced block of Python, or of no language, after the thinking; None without one."""
    return last_block(response, _PYTHON)


def _run(program: str, case: Case, limits: sandbox.Limits) -> sandbox.Result:
    source = program.encode("utf-8", "replace")
    if isinstance(case, Output):
        return sandbox.run(source, stdin=case.stdin.encode("utf-8", "replace"), limits=limits)
    request = json.dumps(case.request).encode("ascii")
    return sandbox.run(source, stdin=request, mode="value", limits=limits)


def _is_right(output: bytes, case: Case, tolerance: float) -> bool:
    if isinstance(case, Output):
        return same_output(output.decode("utf-8", "replace"), case.expected, tolerance)
    is_value, value = read_value(output)
    if not is_value:
        return False
    if isinstance(case, Truth):
        return bool(value) is case.expected
    return same_value(value, case.expected, tolerance, exact=case.exact)
