"""Readers of literals, arithmetic and formulas: exact where they read, and nothing runs where they do not."""

from __future__ import annotations

import importlib
import re
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from copd_megatron.rewards.parsing.arithmetic import Calculation, calculate, calculate_integer
from copd_megatron.rewards.parsing.literals import literal
from copd_megatron.rewards.parsing.magnitude import is_evaluable, is_tall
from copd_megatron.rewards.parsing.symbolic import formula
from copd_megatron.rewards.parsing.syntax import NotUnderstoodError
from tests.support.hostile_answers import CODE, DEEP, HOSTILE, HUGE

READERS: list[Callable[[str], Any]] = [literal, calculate, calculate_integer, formula]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[1, -2.5, 'a', None, True]", [1, -2.5, "a", None, True]),
        (" (1, [2])\n", (1, [2])),
        ("'abc'", "abc"),
        ("[]", []),
    ],
)
def test_literals(text: str, value: object) -> None:
    assert literal(text) == value


@pytest.mark.parametrize(
    "text", ["{1}", "{'a': 1}", "1 + 2", "x", "[*[1]]", "-'a'", "b'a'", "1j", "f'{1}'", "..."]
)
def test_what_is_no_literal(text: str) -> None:
    with pytest.raises(NotUnderstoodError):
        literal(text)


def test_arithmetic_is_exact() -> None:
    assert calculate("(1/3 + 1/6) * 2 - -1") == Calculation(Fraction(2), (1, 3, 1, 6, 2, 1))
    assert calculate("1/10 + 2/10").value == Fraction(3, 10)
    assert calculate_integer("((0x1f + 2) << 3) & ~0x8 ^ 5 | 1") == ((0x1F + 2) << 3) & ~0x8 ^ 5 | 1
    assert calculate_integer("-9 >> 1") == -5


SUMS = st.recursive(
    st.integers(0, 99).map(str),
    lambda part: st.builds("({} {} {})".format, part, st.sampled_from("+-*/"), part),
)


@given(SUMS)
@example("1/0")
def test_arithmetic_agrees_with_python(text: str) -> None:
    try:
        found = calculate(text).value
    except NotUnderstoodError as error:
        assert "ZeroDivision" in str(error)
        return
    exact = re.sub(r"(\d+)", r"Fraction(\1)", text)
    assert found == eval(exact, {"__builtins__": {}, "Fraction": Fraction}, {})


@pytest.mark.parametrize(
    "text", ["2**3", "7//2", "7 % 2", "1.5", "x", "1 if 1 else 2", "1_0", "", "1,2", "2(3)"]
)
def test_arithmetic_of_the_task_only(text: str) -> None:
    with pytest.raises(NotUnderstoodError):
        calculate(text)


@pytest.mark.parametrize(
    "text",
    [
        "-45*x**8 + 133*x**6/10 - 12*x",
        "3*cos(7*x - 9)**2/2 + C",
        "exp(-x)*log(x) + sqrt(x)/2 - pi*E",
        "0.25*x - 1.500",
        "asin(x)*Abs(x) + 2**(1/2)",
        "(-10*x - 10)**(3/2)",
        "x**-2 + y",
    ],
)
def test_formulas_are_what_sympy_would_parse(text: str) -> None:
    sympy = importlib.import_module("sympy")
    symbols = {"C": sympy.Symbol("C")}
    assert formula(text) == sympy.parse_expr(text, local_dict=symbols)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "Integral(x, x)",
            "x.diff",
            "x[0]",
            "sin",
            "sin(x, y)",
            "exp(x=1)",
            "f(x)",
            "lambda: 1",
            "x < 1",
            "'x'",
        ),
        *("x % 2", "x // 2", "True", "x if x else y", "x and y", "__import__('os')", "_x", "'x'"),
        *("x**1001", "(x**999)**999", "2**20000", "10**400*10**4000*10**4000", "1e9999"),
    ],
)
def test_what_is_no_formula(text: str) -> None:
    with pytest.raises(NotUnderstoodError):
        formula(text)


@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
def test_no_reader_runs_or_hangs_on_hostile_text(read: Callable[[str], Any], tmp_path: Any) -> None:
    read("1")  # sympy is imported at first use
    mark = tmp_path / "mark"
    for name, text in HOSTILE.items():
        begin = time.monotonic()
        try:
            read(text.format(mark=mark) if name.startswith("code") else text)
        except NotUnderstoodError:
            assert len(str(sys.exc_info()[1])) < 400
        assert time.monotonic() - begin < 5.0, name
    assert not mark.exists()
    for kind in ("tower", "high tower", "shift", "list repeated", "range", "factorial", "exponent"):
        with pytest.raises(NotUnderstoodError):
            read(HUGE[kind])
    for text in (*CODE.values(), DEEP["brackets"], DEEP["parentheses"], DEEP["signs"]):
        with pytest.raises(NotUnderstoodError):
            read(text)


TALL = [
    *("9^{9^9}", "9^{9^{9^9}}", "9**9**9", "9 ^ 9 ^ 9", "100000!", "(1000000)!", "10^{10^7}", "0.1^{9^9}"),
    *("2^{10000000}", r"(1, 9^{9^9})", r"\gcd(9^{9^9}, 3)", r"9^{9^{9}} \bmod 7", "1e99999", "1E+99999999"),
]
TOO_LARGE = [
    *("(x+y+z+w+v)^{9999}", "(x+y+z)^{400}", "(a+b+c+d)^{99}"),
    *("(x+1)^{100000}", "((10^{99})^{99})^{99}", r"9^{9 \cdot 9 \cdot 10^{9}}", r"e^{e^{20}}", r"(99!)!"),
    *(r"\begin{pmatrix} 9^{9 + 9^9} \end{pmatrix}", r"\{9^{1 + 9^9}, 1\}"),
]
EVALUABLE = [
    *("2^{1000}", "1000!", "2^{2^{10}}", r"\frac{1}{2^{99}}", "x^2+2x+1", "n!", "2^n", r"\pi^{e^2}", "x=5"),
    *(
        r"e^{i\pi/3}",
        r"(0,\infty)",
        r"\binom{100}{50}",
        r"10\%",
        "(x+1)^{50}",
        "(x+y+z)^{20}",
        "e^{e^{e}}",
        "0.5",
    ),
    *(r"6.63 \times 10^{-34}", "x^{2^3}", "10^{2^4}", "99999", "3!"),
]


@pytest.mark.parametrize(("texts", "tall"), [(TALL, True), (EVALUABLE, False)])
def test_what_is_too_large_to_read(texts: list[str], tall: bool) -> None:
    assert [text for text in texts if is_tall(text) is not tall] == []


@pytest.mark.parametrize(("texts", "evaluable"), [(TOO_LARGE, False), (EVALUABLE, True)])
def test_what_is_too_large_to_evaluate(texts: list[str], evaluable: bool) -> None:
    parse = importlib.import_module("math_verify").parse
    parsed = {text: parse(f"${text}$", parsing_timeout=None)[0] for text in texts}
    assert [text for text, expression in parsed.items() if is_evaluable(expression) is not evaluable] == []
