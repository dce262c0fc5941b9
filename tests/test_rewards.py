"""Verifiers, final answers and the registry."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from copd_megatron.config.schema import RewardConfig
from copd_megatron.rewards import Grader, UnknownVerifierError, registry
from copd_megatron.rewards.final_answer import Source, final_answer, last_boxed, normalize
from copd_megatron.rewards.verifiers.numeric import is_number, last_number
from tests.support.rollouts import COMMAND, rollout


def grade_one(name: str, response: str, answer: str, **metadata: Any) -> float:
    return registry.get(name).verify(response, answer, metadata)


# ---------------------------------------------------------------- final answers


@pytest.mark.parametrize(
    ("response", "text", "source"),
    [
        (r"so \boxed{1} or rather \boxed{\frac{1}{2}}. Answer: 9", r"\frac{1}{2}", Source.boxed),
        (r"\boxed{3} and an unclosed \boxed{4", "3", Source.boxed),
        ("<answer>a</answer> then <answer> b </answer> Answer: c", "b", Source.tag),
        ("The answer is 5.\nFinal Answer: 7", "7", Source.marker),
        ("**Answer:** blue", "blue", Source.marker),
        ("Answer:\n\n1 2\n3 4\n", "1 2\n3 4", Source.marker),
        ("I add them.\n\n  12  \n", "12", Source.last_line),
        ("<think>Answer: 3</think>\n4", "4", Source.last_line),
        ("<think>Answer: 3 and then it was cut", "", Source.nothing),
        ("  \n ", "", Source.nothing),
        ("The answers are many\n8", "8", Source.last_line),
        ("The answer is 42. I hope this answer is helpful!", "42.", Source.marker),
        ("The answer is 42.\nI think the answer is correct.", "42.", Source.marker),
        ("**Answer: 42**", "42", Source.marker),
        ("Answer\uff1a42", "42", Source.marker),
        ('So:\n```json\n{"a": 1}\n```', '{"a": 1}', Source.last_line),
        ("```\n1 2\n3 4\n```", "1 2\n3 4", Source.last_line),
        ("```", "```", Source.last_line),
    ],
)
def test_final_answer(response: str, text: str, source: Source) -> None:
    found = final_answer(response)
    assert (found.text, found.source) == (text, source)


def test_final_answer_of_several_lines() -> None:
    assert final_answer("1 2\n3 4").text == "3 4"
    assert final_answer("1 2\n3 4", multiline=True).text == "1 2\n3 4"


def test_normalize() -> None:
    assert normalize("  The  Big\tApple. ") == "the big apple"
    assert normalize(r"$\text{Blue}$") == "blue"
    assert normalize("**'x'**") == "x"
    assert normalize("\uff21") == "a"
    assert normalize("$5$ and $6$") == "$5$ and $6$"
    assert normalize("Blue", case_sensitive=True) == "Blue"


@given(st.text(), st.text(alphabet="abc123 ,.$^"))
def test_final_answer_takes_any_text(text: str, boxed: str) -> None:
    found = final_answer(text)
    assert found.text == found.text.strip()
    assert bool(found.text) or found.source is not Source.last_line
    after = final_answer(f"{text}</think>{boxed}\\boxed{{{boxed}}}")
    assert (after.text, after.source) == (boxed.strip(), Source.boxed)


def test_long_hostile_text_takes_no_time() -> None:
    started = time.monotonic()
    for text in (
        "\\boxed{" * 20_000,
        "answer is " * 20_000,
        "1," * 50_000,
        "<answer>" * 20_000,
        "9" * 200_000,
    ):
        final_answer(text)
        for verifier, answer in (("exact", "a"), ("numeric", "7"), ("choice", "A")):
            assert grade_one(verifier, text, answer) == 0.0
    assert time.monotonic() - started < 20.0


def test_last_boxed_nested() -> None:
    assert last_boxed(r"\boxed{\sqrt{\frac{a}{b}}}") == r"\sqrt{\frac{a}{b}}"
    assert last_boxed("none") is None


# ---------------------------------------------------------------- verifiers


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        ("Answer: Blue.", "blue", 1.0),
        ("blue it is\nred", "blue", 0.0),
        ("1 2\n3 4", "1 2\n3 4", 1.0),
        ("", "", 0.0),
        ("", "blue", 0.0),
    ],
)
def test_exact(response: str, answer: str, reward: float) -> None:
    assert grade_one("exact", response, answer) == reward


def test_exact_case_sensitive() -> None:
    assert grade_one("exact", "blue", "Blue") == 1.0
    assert grade_one("exact", "blue", "Blue", case_sensitive=True) == 0.0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,234", 1234),
        ("-7", -7),
        ("x = 3 then 3.50", 3.5),
        ("$12.00", 12),
        ("3/4", 0.75),
        ("2.5e-3", 0.0025),
        (".5", 0.5),
        ("\u22125", -5),
        ("10-3", 3),
        ("1/0", None),
        ("none", None),
        ("1e999", None),
        ("9" * 5000, None),
    ],
)
def test_last_number(text: str, number: float | None) -> None:
    assert last_number(text) == number


def test_numeric() -> None:
    assert grade_one("numeric", "Answer: 42 apples", "42") == 1.0
    assert grade_one("numeric", "Answer: 1000000001", "1000000000") == 0.0
    assert grade_one("numeric", "0.30000000000000004", "0.3") == 1.0
    assert grade_one("numeric", "3.14", "3.14159", abs_tol=0.01) == 1.0
    assert grade_one("numeric", "3.14", "3.14159", abs_tol=0.001) == 0.0
    assert grade_one("numeric", "102", "100", rel_tol=0.05) == 1.0
    assert grade_one("numeric", "no idea", "3") == 0.0
    with pytest.raises(ValueError, match="holds no number"):
        grade_one("numeric", "3", "three")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (r"\frac{3}{4}", 0.75),
        (r"-\dfrac{3}{4}", -0.75),
        (r"\frac34", 0.75),
        (r"2\frac{1}{2}", 2.5),
        (r"3 \times 10^5", 300_000),
        (r"$3\times10^{-5}$", 3e-5),
        ("3\u00d710^5", 300_000),
        ("10^{6}", 1_000_000),
        ("1e-05", 1e-5),
        (r"\$80{,}000", 80_000),
        (r"80\,000", 80_000),
        ("80~000", 80_000),
        (r"50\%", 50),
        (r"12 \text{ m}^2", 12),
        (r"12^\circ", 12),
        ("$5^{th}$", 5),
        ("25 m/s^2", 25),
        (r"x_2 = 7", 7),
        # part of a formula, so no number
        (r"4\sqrt{2}", None),
        (r"4\sqrt(2)", None),
        (r"12\pi", None),
        ("pi/2", None),
        ("2^{10}", None),
        ("5!", None),
        (r"\log_{10} 5", None),
        ("x_2", None),
    ],
)
def test_last_number_in_latex(text: str, number: float | None) -> None:
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("answer", "gold", "metadata", "reward"),
    [
        ("4" * 360, "-0.5", {"rel_tol": 1e-3}, 0.0),
        ("4" * 360, "4" * 359 + "5", {"rel_tol": 1e-3}, 1.0),
        ("4" * 360, "5" * 360, {"rel_tol": 1e-3}, 0.0),
        ("4" * 360, "4" * 359 + "5", {}, 0.0),
        ("-" + "4" * 360, "4" * 360, {"abs_tol": 1.0}, 0.0),
        ("1/" + "9" * 360, "0", {}, 0.0),  # no float holds the denominator
    ],
)
def test_numeric_where_no_float_reaches(
    answer: str, gold: str, metadata: dict[str, Any], reward: float
) -> None:
    assert registry.get("numeric").verify(f"Answer: {answer}", gold, metadata) == reward


@pytest.mark.parametrize("tolerance", [math.inf, math.nan, -1.0])
def test_tolerances_that_are_none(tolerance: float) -> None:
    for name in ("rel_tol", "abs_tol"):
        with pytest.raises(ValueError, match="finite and at least 0"):
            registry.get("numeric").verify("Answer: 1.5", "1", {name: tolerance})


def test_is_number() -> None:
    assert is_number("-1,000.5") and is_number("3/4")
    assert not is_number("3 apples") and not is_number("") and not is_number("1 2")


@given(st.integers(-(10**30), 10**30))
def test_numeric_round_trips_integers(number: int) -> None:
    assert grade_one("numeric", f"Answer: {number}", str(number)) == 1.0
    assert grade_one("numeric", f"Answer: {number:,}", str(number)) == 1.0
    assert grade_one("numeric", f"Answer: {number + 1}", str(number)) == 0.0


@pytest.mark.parametrize(
    "response", ["B", "(b)", "Answer: B. Paris", "option B", r"\boxed{B}", "[B] Paris", "Paris."]
)
def test_choice_right(response: str) -> None:
    choices = ["London", "Paris", "Rome"]
    assert grade_one("choice", response, "B", choices=choices) == 1.0
    assert grade_one("choice", response, "Paris", choices=choices) == 1.0
    assert grade_one("choice", response, "A", choices=choices) == 0.0


@pytest.mark.parametrize("response", ["", "Berlin", "both A and B", "E", "a city"])
def test_choice_nothing_picked(response: str) -> None:
    for gold in "ABC":
        assert grade_one("choice", response, gold, choices=["London", "Paris", "Rome"]) == 0.0


@pytest.mark.parametrize(
    "response", ["**Answer: C**", "C - Paris", "Answer\uff1aC", "C: Paris", "C, I think"]
)
def test_choice_in_other_forms(response: str) -> None:
    assert grade_one("choice", response, "C") == 1.0
    assert grade_one("choice", response, "B") == 0.0


def test_choice_among_letters() -> None:
    groups = ["O", "A", "B", "AB"]
    assert grade_one("choice", "B", "B", choices=groups) == 1.0
    assert grade_one("choice", "A", "B", choices=groups) == 0.0, "B is the second option, which reads A"
    assert grade_one("choice", "AB", "D", choices=groups) == 1.0


def test_choice_bad_gold() -> None:
    with pytest.raises(ValueError, match="neither a letter"):
        grade_one("choice", "A", "Berlin", choices=["London", "Paris"])


@pytest.mark.parametrize(
    ("verifier", "gold", "settings"),
    [
        ("numeric", "5", {"rel_tol": None, "abs_tol": None}),
        ("choice", "C", {"choices": None}),
        ("exact", "5", {"case_sensitive": None}),
        ("math", "5", {"float_rounding": None}),
        ("box_iou", "[1,2,3,4]", {"iou_threshold": None}),
        ("temporal_iou", "1-2", {"iou_threshold": None}),
        ("grid", "[[5]]", {"partial": None}),
        ("list", "[5]", {"partial": None, "ordered": None}),
        ("point", "[5, 5]", {"max_distance": 0.5, "scale": None, "image_size": None, "partial": None}),
        ("reasoning_gym", "5", {"dataset": "gcd", "entry": None, "question": None, "binary": None}),
    ],
)
def test_a_null_setting_is_none_at_all(verifier: str, gold: str, settings: dict[str, Any]) -> None:
    """As tables in columns (Parquet) have it for every setting that another row has."""
    assert grade_one(verifier, gold, gold, **settings) == 1.0
    assert grade_one(verifier, "6", gold, **settings) == 0.0


@pytest.mark.parametrize(
    "response",
    [
        'Here it is:\n```json\n[{"bbox_2d": [1, 2, 3, 4], "label": "cat"}]\n```',
        '```json\n{\n  "bbox_2d": [1, 2, 3, 4],\n  "label": "cat"\n}\n```\n',
        "Answer:\n```\n[1, 2, 3, 4]\n```",
    ],
)
def test_boxes_in_a_fenced_block(response: str) -> None:
    assert grade_one("box_iou", response, "[1, 2, 3, 4]") == 1.0


MATH_CASES = [
    (r"so \boxed{\frac{1}{2}}", "0.5", 1.0),
    (r"the answer is $x=5$.", "5", 1.0),
    ("we get 42.", "42", 1.0),
    (r"\boxed{(x+1)^2}", "x^2+2x+1", 1.0),
    (r"Answer: \frac{3}{4}", r"\dfrac34", 1.0),
    ("Answer: {1,2,3}", r"\{3,2,1\}", 1.0),
    (r"\boxed{\sqrt{8}}", r"$2\sqrt{2}$", 1.0),
    (r"\boxed{0.333}", r"\frac{1}{3}", 0.0),
    (r"\boxed{(x-1)^2}", "x^2+2x+1", 0.0),
    ("nothing here", "42", 0.0),
    ("", "42", 0.0),
    # rounding to decimals makes small numbers equal
    ("0.0000002", "0.0000001", 0.0),
    (r"\boxed{9.1 \times 10^{-31}}", r"6.63 \times 10^{-34}", 0.0),
    (r"\boxed{6.63 \cdot 10^{-34}}", r"6.63 \times 10^{-34}", 1.0),
    (r"\boxed{\frac{1}{2^{98}}}", r"\frac{1}{2^{99}}", 0.0),
    (r"\boxed{2^{-99}}", r"\frac{1}{2^{99}}", 1.0),
    (r"\boxed{0.333333}", "1/3", 1.0),
    (r"\boxed{\sqrt{2}+\sqrt{3}}", r"\sqrt{5+2\sqrt{6}}", 1.0),
    (r"\boxed{10\%}", "10", 1.0),
    ("Answer: 0.00001", "1e-05", 1.0),
    ("Answer: 1e-05", "0.00002", 0.0),
    # a choice of values
    ("The answer is 1 or 2.", "2", 0.0),
    ("Answer: either 7 or 2", "2", 0.0),
    (r"\boxed{1 \text{ or } 2}", "2", 0.0),
    ("Answer: 1/2 or 0.5", "0.5", 1.0),
    ("Answer: $1$ or $2$", r"\{1,2\}", 1.0),
    ("Answer: 42 or so", "42", 1.0),
    # what is too large to evaluate is compared as it is written
    (r"\boxed{9^{9^{9^9}}}", "2", 0.0),
    (r"\boxed{9^{9^{9^9}}}", "9^{9^{9^{9}}}", 1.0),
    ("Answer: 9^9^9^9", "2", 0.0),
    (r"\boxed{100000!}", "2", 0.0),
    (r"\boxed{2^{2^{10}}}", "2^{1024}", 1.0),
    ("\u0663", "3", 1.0),
]


@pytest.mark.parametrize(("response", "answer", "reward"), MATH_CASES)
def test_math(response: str, answer: str, reward: float) -> None:
    assert grade_one("math", response, answer) == reward


def test_math_off_the_main_thread() -> None:
    rewards: list[float] = []
    thread = threading.Thread(
        target=lambda: rewards.extend(
            grade_one("math", response, answer) for response, answer, _ in MATH_CASES
        )
    )
    thread.start()
    thread.join()
    assert rewards == [reward for _, _, reward in MATH_CASES]


def test_reasoning_gym_binary_and_partial() -> None:
    # word_sorting gives partial credit: one of three words in place.
    metadata = {"dataset": "word_sorting", "entry": {"sorted_words": ["a", "b", "c"]}}
    right, partial, wrong = "Answer: a, b, c", "Answer: a, c, b", "Answer: x, y, z"
    assert [grade_one("reasoning_gym", r, "a, b, c", **metadata) for r in (right, partial, wrong)] == [
        1,
        0,
        0,
    ]
    scores = [
        grade_one("reasoning_gym", r, "a, b, c", binary=False, **metadata) for r in (right, partial, wrong)
    ]
    assert scores[0] == 1.0 and 0.0 < scores[1] < 1.0 and scores[2] < scores[1]


# ---------------------------------------------------------------- registry


def test_unknown_verifier_names_the_nearest() -> None:
    with pytest.raises(UnknownVerifierError, match=r"unknown verifier 'nummeric'.*Did you mean 'numeric'"):
        Grader(RewardConfig(verifiers=["nummeric"]))


@pytest.mark.parametrize("name", ["no_such_module:f", "tests.support.misbehaving_verifiers:no_such_function"])
def test_verifier_by_path_that_is_not_there(name: str) -> None:
    with pytest.raises(UnknownVerifierError, match=r"cannot be imported.*PYTHONPATH"):
        registry.get(name)


def test_verifier_by_path_must_be_callable() -> None:
    with pytest.raises(UnknownVerifierError, match="not a function"):
        registry.get("copd_megatron:__version__")


def test_register_refuses_nested_functions_and_taken_names() -> None:
    def nested(response: str, answer: str, metadata: Any) -> float:
        return 1.0

    with pytest.raises(ValueError, match="not a module-level function"):
        registry.register("nested")(nested)
    registry.get("exact")
    with pytest.raises(ValueError, match="already"):
        registry.register("exact")(rollout)  # type: ignore[arg-type]


def test_registered_function_keeps_its_settings_when_named_by_path() -> None:
    assert registry.get("copd_megatron.rewards.verifiers.exact:exact").isolated is False
    assert registry.get(COMMAND).isolated is True


def test_rewards_import_nothing_heavy() -> None:
    code = (
        "import sys, copd_megatron.data; from copd_megatron.rewards import registry;"
        "[registry.get(n) for n in registry.known()];"
        "slow = {'torch', 'vllm', 'megatron', 'transformers', 'math_verify', 'reasoning_gym', 'webdataset'};"
        "assert not slow & set(sys.modules), slow & set(sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.mark.parametrize(
    "response", ["Answer: right, yes", "The answer is right, yes", "Answer: Right, yes."]
)
def test_an_answer_may_be_the_word_right(response: str) -> None:
    """As in tasks of directions, where it is no remark about the answer."""
    assert registry.get("exact").verify(response, "right, yes", {}) == 1.0
    assert registry.get("exact").verify("Answer: wrong", "wrong", {}) == 1.0
