"""Any text as an answer, a program, a proof or a set of test cases: a grade or a clear refusal, and soon."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copd_megatron.rewards import registry
from copd_megatron.rewards.code_cases import read_cases, read_value, same_output, same_value
from copd_megatron.rewards.final_answer import adjacent_boxes, final_answer, normalize
from copd_megatron.rewards.proofs import RejectedError, coq, lean, read_statement
from copd_megatron.rewards.proofs.coq_script import check_header, read_proof, sentences
from copd_megatron.rewards.terms import read_terms
from copd_megatron.rewards.verifiers.code import last_program
from tests.support.fuzzing import JSON, LONG, damaged_value

SECONDS = 5.0
SHORT = settings(LONG, max_examples=25)
GOLDS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "choice": [
        ("B", {}),
        ("Paris", {"choices": ["Rome", "Paris", "B"]}),
        ("AB", {"choices": ["O", "A", "AB"]}),
    ],
    "list": [("1, 2, 3", {}), ("a, b", {"ordered": False, "partial": True}), ("7", {"partial": True})],
    "grid": [("[[1, 2], [3, 4]]", {}), ("1 2\n3 x", {"partial": True})],
    "point": [("[1, 2, 30, 40]", {}), ("[5, 5]", {"max_distance": 3, "partial": True})],
    "box_iou": [("[1, 2, 30, 40]", {}), ("[0, 0, 1, 1]", {"iou_threshold": 0.5})],
    "exact": [("yes", {}), ("Two lines\nof text", {}), ("A", {"case_sensitive": True, "also": ["B"]})],
    "numeric": [("42", {}), ("-0.5", {"rel_tol": 1e-3}), ("1e300", {}), ("3/4", {"abs_tol": 0.1})],
    "temporal_iou": [("1.5-3.0", {}), ("0:01 - 1:10:00", {"iou_threshold": 0.3})],
    "format": [("", {}), ("", {"partial": True, "style": "boxed"}), ("", {"parts": ["end"], "style": "tag"})],
}
"""Gold answers and settings of every verifier that runs in the trainer's own process."""
PIECES = st.sampled_from(
    [
        *(
            "0",
            "1",
            "42",
            "1,234",
            "-3",
            ".5",
            "1e9",
            "9" * 500,
            "3/4",
            "1/0",
            "0:01",
            "1.5",
            "\u0664",
            "\u00bd",
        ),
        *("A", "B", "(B)", "Option C:", "Paris", "x", "y", "x=", "y=", "start", "end", "yes", "a", "\u0130"),
        *(
            "[",
            "]",
            "(",
            ")",
            "{",
            "}",
            "[[",
            "]]",
            "|",
            "---",
            "<",
            ">",
            ",",
            ";",
            ":",
            ".",
            "-",
            "\u2013",
            " to ",
        ),
        *(
            "\n",
            "\r",
            "\t",
            " ",
            "\0",
            "\u2028",
            "\ud800",
            "e\u0301",
            "\u0301" * 40,
            "`",
            "```",
            "```python\n",
        ),
        *(
            "\\boxed{",
            "\\text{",
            "\\frac{1}{2}",
            "^",
            "_",
            "\\",
            "$",
            "%",
            "**",
            '"',
            "'",
            "\u201c",
            "#",
            "/*",
        ),
        *(
            "<think>",
            "</think>",
            "<answer>",
            "</answer>",
            "Answer: ",
            "the answer is ",
            "I hope this",
            "and",
            "or",
        ),
    ]
)
TEXTS = (
    st.lists(PIECES, max_size=16).map("".join)
    | st.text(max_size=60)
    | st.lists(PIECES, max_size=3).map(lambda parts: "".join(parts) * 60)
)
SCRIPT = st.lists(
    st.sampled_from(
        [
            *(
                "Proof. ",
                "Qed. ",
                "Lemma t : True. ",
                "auto. ",
                "Axiom a : False. ",
                "Admitted. ",
                "(*",
                "*)",
                '"',
            ),
            *(
                "theorem t : True := by",
                "by\n",
                "sorry",
                "/-",
                "-/",
                "--",
                "\u00ab",
                "#",
                "@[",
                "exact x",
                " :=\n",
            ),
            *(
                "```",
                "```coq\n",
                "```lean\n",
                "```v",
                "\n```\n",
                "\n",
                ". ",
                "...",
                "2: ",
                "{ ",
                "} ",
                "- ",
                "\0",
            ),
            *(
                "Require Import Lia.",
                "From X Require Y.",
                "Open Scope nat_scope.",
                "import Mathlib",
                "<think>",
            ),
        ]
    ),
    max_size=18,
).map("".join)
TESTS: list[Any] = [
    {"inputs": ["1\n"], "outputs": ["2\n"]},
    {"fn_name": "f", "inputs": [[1], [2]], "outputs": [1.5, [2]]},
    {"fn_name": "f", "inputs": ["1\n2"], "outputs": ["[3]"], "wrapped_outputs": True},
    ["assert f(1) == 2", "assert f(2) is True", "assert not f(3)", "assert f(4)"],
]
STATEMENT = {
    "name": "t",
    "statement": "True",
    "header": "",
    "definitions": "",
    "axioms": ["a"],
    "assistant": "coq",
}
TERMS = {"terms": [{"verifier": "exact", "weight": 0.5, "answer": "x", "metadata": {}}]}


@contextlib.contextmanager
def soon() -> Iterator[None]:
    begin = time.process_time()  # a busy machine is no slow parser
    yield
    assert time.process_time() - begin < SECONDS


def check_answer(name: str, text: str) -> None:
    verify = registry.get(name).verify
    for gold, metadata in GOLDS[name]:
        for response in (text, rf"\boxed{{{text}}}", f"Answer: {text}", f"<answer>{text}</answer>"):
            with soon():
                reward = verify(response, gold, metadata)
            assert 0.0 <= reward <= 1.0 and verify(response, gold, metadata) == reward


def check_gold(name: str, text: str, metadata: dict[str, Any]) -> None:
    """A gold answer or settings that nobody has read: graded, or refused with a ValueError or TypeError."""
    with soon(), contextlib.suppress(ValueError, TypeError):
        assert not math.isnan(registry.get(name).verify("Answer: 1", text, metadata))


def check_extraction(text: str) -> None:
    with soon():
        found = final_answer(text)
        assert len(found.text) <= len(text)
        final_answer(text, multiline=True)
        adjacent_boxes(text)
        assert normalize(text) == normalize(text)
        program = last_program(f"{text}\n```python\nprint(1)\n```")
        assert program in (None, "print(1)") or "```" in text or "think" in text
        last_program(text)
        same_output(text, "1.5 x\n2", 1e-6)
        same_output("1.5 x\n2", text, 1e-6)
        is_value, value = read_value(text.encode("utf-8", "surrogatepass"))
        for exact in (True, False):
            assert (
                not is_value or value is ... or same_value(value, value, 1e-6, exact=exact) in (True, False)
            )


def check_proof(text: str) -> None:
    with soon():
        for name, read in (("coq", coq._proof_text), ("lean", lambda block: lean.read_body(block, "t"))):
            for response in (text, f"```{name}\n{text}\n```"):
                with contextlib.suppress(RejectedError):
                    assert isinstance(read(response), str)
        with contextlib.suppress(RejectedError):
            sentences(text)
        with contextlib.suppress(ValueError, RejectedError):
            check_header(text)
        with contextlib.suppress(RejectedError):
            read_proof(text, "t", "")
        for read_axioms in (coq.assumptions, lean.assumptions):
            for printed in (text, f"Axioms:\n{text}", f"'copdCheck' depends on axioms: [{text}]"):
                with contextlib.suppress(RejectedError):
                    read_axioms(printed)


def check_sample(tests: Any, given_statement: Any, terms: Any) -> None:
    """A sample that is damaged is refused with a ValueError."""
    with soon():
        with contextlib.suppress(ValueError):
            assert read_cases(json.dumps(tests), {})
        with contextlib.suppress(ValueError):
            assert read_cases("", {"tests": tests})
        with contextlib.suppress(ValueError):
            read_statement(json.dumps(given_statement))
        with contextlib.suppress(ValueError):
            read_terms(terms if isinstance(terms, dict) else {"terms": terms})


@pytest.mark.parametrize("name", GOLDS)
def test_any_text_is_graded(name: str) -> None:
    SHORT(given(TEXTS)(lambda text: check_answer(name, text)))()


@pytest.mark.parametrize("name", GOLDS)
def test_any_gold_answer_is_used_or_refused(name: str) -> None:
    settings_of = st.dictionaries(
        st.sampled_from(sorted({key for _, metadata in GOLDS[name] for key in metadata}) or ["x"]), JSON
    )
    SHORT(given(TEXTS, settings_of)(lambda text, metadata: check_gold(name, text, metadata)))()


@SHORT
@given(TEXTS)
def test_any_text_gives_an_answer_and_a_program(text: str) -> None:
    check_extraction(text)


@SHORT
@given(SCRIPT | TEXTS)
def test_any_text_is_a_proof_or_none(text: str) -> None:
    check_proof(text)


@SHORT
@given(st.data())
def test_damaged_samples_are_refused(data: st.DataObject) -> None:
    tests = damaged_value(data, data.draw(st.sampled_from(TESTS)))
    check_sample(tests, damaged_value(data, STATEMENT), damaged_value(data, TERMS))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(LONG, max_examples=20_000)
@given(st.data())
def test_many_of_all_kinds(data: st.DataObject) -> None:
    text = data.draw(TEXTS)
    for name in GOLDS:
        check_answer(name, text)
    name = data.draw(st.sampled_from(sorted(GOLDS)))
    metadata = damaged_value(data, dict(GOLDS[name][-1][1]))
    check_gold(name, text, metadata if isinstance(metadata, dict) else {})
    check_extraction(text)
    check_proof(data.draw(SCRIPT | TEXTS))
    tests = damaged_value(data, data.draw(st.sampled_from(TESTS)))
    check_sample(tests, damaged_value(data, STATEMENT), damaged_value(data, TERMS))
