"""Test cases of the verifier ``code``: read from a sample, and compared with what a program gave."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")


@dataclass(frozen=True)
class Output:
    """A script's input, and what it should write."""

    stdin: str
    expected: str


@dataclass(frozen=True)
class Value:
    """What to evaluate in the sandbox (a request of ``sandbox/inside.py``), and what it should be."""

    request: Mapping[str, Any]
    expected: Any
    exact: bool
    """Types of sequences count, and numbers have no tolerance, as in an assert. Otherwise a tuple equals
    a list."""


@dataclass(frozen=True)
class Truth:
    """What to evaluate in the sandbox, and whether it should be true."""

    request: Mapping[str, Any]
    expected: bool


Case = Output | Value | Truth


def read_cases(answer: str, metadata: Mapping[str, Any]) -> list[Case]:
    """The cases of a sample: metadata ``tests``, or else the answer, as JSON.

    ``{"inputs": [...], "outputs": [...]}``: scripts, in text or lists of lines. With ``fn_name``: arguments
    and return values of a function, as JSON values or, LiveCodeBench's way, as text with one JSON value a
    line; ``wrapped_outputs`` true says that every output stands in a list of one, as in APPS.
    ``{"asserts": [...]}`` or a list of text: assert lines.

    Raises ValueError: none of these, no case at all, or an assert that cannot be judged from outside.
    """
    tests = metadata.get("tests")
    tests = answer if tests is None else tests
    if isinstance(tests, str):
        try:
            tests = json.loads(tests)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the tests of verifier 'code' are no JSON: {error}") from error
    if isinstance(tests, Mapping) and "asserts" in tests:
        tests = tests["asserts"]
    cases: list[Case] = []
    if isinstance(tests, list) and all(isinstance(line, str) for line in tests):
        cases = [_assert_case(line) for line in tests]
    elif isinstance(tests, Mapping):
        cases = _paired_cases(tests)
    if not cases:
        raise ValueError(
            "the tests of verifier 'code' hold no case. Give inputs and outputs, or a list of assert lines."
        )
    return cases


def _paired_cases(tests: Mapping[str, Any]) -> list[Case]:
    inputs, outputs = tests.get("inputs"), tests.get("outputs")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
        raise ValueError("the tests of verifier 'code' need lists 'inputs' and 'outputs' of the same length.")
    name = tests.get("fn_name")
    if name is None:
        return [Output(_text(given), _text(wanted)) for given, wanted in zip(inputs, outputs, strict=True)]
    wrapped = bool(tests.get("wrapped_outputs"))
    return [
        _function_case(str(name), given, wanted, wrapped=wrapped)
        for given, wanted in zip(inputs, outputs, strict=True)
    ]


def _text(value: object) -> str:
    if isinstance(value, list):
        return "\n".join(str(line) for line in value)
    if not isinstance(value, str):
        raise ValueError(f"inputs and outputs of a script are text or lists of lines, not {value!r:.60}.")
    return value


def _function_case(name: str, given: object, wanted: object, *, wrapped: bool) -> Value:
    arguments = [json.loads(line) for line in given.splitlines()] if isinstance(given, str) else given
    expected = json.loads(wanted) if isinstance(given, str) and isinstance(wanted, str) else wanted
    if not isinstance(arguments, list):
        raise ValueError(f"the arguments of {name} are no list: {given!r:.60}.")
    if wrapped:
        if not isinstance(expected, list) or len(expected) != 1:
            raise ValueError(f"wrapped_outputs: an output of {name} is no list of one: {wanted!r:.60}.")
        expected = expected[0]
    return Value({"function": name, "arguments": arguments}, expected, exact=False)


def _assert_case(line: str) -> Case:
    """``assert f(x) == literal`` (either way round), ``is True`` and the like, ``assert f(x)`` and
    ``assert not f(x)``. The expected value is taken out, so that it never enters the sandbox."""
    try:
        body = ast.parse(line.strip()).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"a test of verifier 'code' is no Python: {line!r:.80}") from error
    if len(body) != 1 or not isinstance(body[0], ast.Assert):
        raise ValueError(f"a test of verifier 'code' is no single assert: {line!r:.80}")
    test = body[0].test
    if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], ast.Eq | ast.Is):
        for left, right in ((test.left, test.comparators[0]), (test.comparators[0], test.left)):
            known, expected = _literal(right)
            if known and _calls(left):
                return Value({"expression": ast.unparse(left)}, expected, exact=True)
    elif isinstance(test, ast.Call):
        return Truth({"expression": ast.unparse(test)}, True)
    elif isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not) and _calls(test.operand):
        return Truth({"expression": ast.unparse(test.operand)}, False)
    raise ValueError(
        f"an assert of verifier 'code' cannot be judged outside the sandbox: {line!r:.80}. "
        "Write it as assert f(x) == literal."
    )


def _literal(node: ast.expr) -> tuple[bool, Any]:
    try:
        return True, ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return False, None


def _calls(node: ast.expr) -> bool:
    return any(isinstance(part, ast.Call) for part in ast.walk(node))


def read_value(output: bytes) -> tuple[bool, Any]:
    """The value that a program gave, as ``repr``; false where it is none."""
    try:
        return True, ast.literal_eval(output.decode("utf-8"))
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return False, None


def same_output(output: str, expected: str, tolerance: float) -> bool:
    """Whether a script wrote what it should: the same words in the same lines. White space within a line, and
    empty lines at either end, do not count. Where a number with a point or an exponent is expected, a number
    within the tolerance will do; whole numbers must be equal."""
    lines, wanted = _lines(output), _lines(expected)
    return len(lines) == len(wanted) and all(
        len(line) == len(other)
        and all(_same_word(word, right, tolerance) for word, right in zip(line, other, strict=True))
        for line, other in zip(lines, wanted, strict=True)
    )


def _lines(text: str) -> list[list[str]]:
    return [line.split() for line in text.strip().split("\n")]


def _same_word(word: str, expected: str, tolerance: float) -> bool:
    if word == expected:
        return True
    if not _NUMBER.fullmatch(expected) or not set(expected) & set(".eE") or not _NUMBER.fullmatch(word):
        return False
    return _close(float(word), float(expected), tolerance)


def _close(value: float, expected: float, tolerance: float) -> bool:
    return math.isfinite(value) and math.isclose(value, expected, rel_tol=tolerance, abs_tol=tolerance)


def same_value(value: Any, expected: Any, tolerance: float, *, exact: bool) -> bool:
    """Whether a value is the expected one; both consist of literals."""
    if exact:
        return bool(value == expected)
    if isinstance(value, list | tuple) and isinstance(expected, list | tuple):
        return _same_items(value, expected, tolerance)
    if isinstance(value, dict) and isinstance(expected, dict):
        texts = {str(key): item for key, item in value.items()}  # JSON has no other keys
        return len(texts) == len(value) == len(expected) and all(
            key in texts and same_value(texts[key], item, tolerance, exact=False)
            for key, item in expected.items()
        )
    numbers = (int, float)
    if isinstance(value, numbers) and isinstance(expected, float):
        try:
            return _close(float(value), expected, tolerance)
        except OverflowError:
            return False
    return bool(value == expected)


def _same_items(value: Sequence[Any], expected: Sequence[Any], tolerance: float) -> bool:
    return len(value) == len(expected) and all(
        same_value(item, right, tolerance, exact=False) for item, right in zip(value, expected, strict=True)
    )
