"""Verifiers, final answers and the registry."""

from __future__ import annotations

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


def test_choice_bad_gold() -> None:
    with pytest.raises(ValueError, match="neither a letter"):
        grade_one("choice", "A", "Berlin", choices=["London", "Paris"])


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
