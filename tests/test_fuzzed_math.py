"""Any text as a mathematical answer: nothing but a grade, and soon."""

from __future__ import annotations

import contextlib
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copd_megatron.rewards import registry
from copd_megatron.rewards.final_answer import FinalAnswer, Source
from copd_megatron.rewards.mathematics.extract import answer_text
from copd_megatron.rewards.mathematics.notation import canonical
from copd_megatron.rewards.mathematics.shapes import UnreadableError, read
from copd_megatron.rewards.proofs import RejectedError
from copd_megatron.rewards.proofs.coq_script import read_proof
from copd_megatron.rewards.proofs.lean import read_body

PIECES = st.sampled_from(
    [
        *(
            "0",
            "1",
            "2",
            "17",
            "0.5",
            "x",
            "y",
            "i",
            "e",
            "n",
            r"\pi",
            r"\infty",
            r"\theta",
            "%",
            "!",
            "\u00bd",
        ),
        *("+", "-", "*", "/", "^", "_", "=", "<", ">", r"\le", r"\ge", r"\ne", r"\pm", r"\cdot", r"\times"),
        *("(", ")", "[", "]", "{", "}", r"\{", r"\}", "|", r"\left", r"\right", r"\langle", r"\rangle"),
        *(
            r"\frac{",
            r"\sqrt{",
            r"\text{",
            r"\boxed{",
            r"\overline{",
            r"\binom{",
            r"\log_",
            r"\sin",
            "$",
            "**",
        ),
        *(
            ",",
            ";",
            ".",
            " ",
            "\n",
            "&",
            r"\\",
            r"\begin{pmatrix}",
            r"\end{pmatrix}",
            r"\cup",
            r"\in",
            r"\approx",
        ),
        *(
            " or ",
            " and ",
            " cm",
            " km/h",
            r"^\circ",
            r"\$",
            "x=",
            "(x,y)=",
            "answer is ",
            "Answer: ",
            "</think>",
        ),
    ]
)
TEXTS = st.one_of(st.lists(PIECES, max_size=14).map("".join), st.text(max_size=40))
GOLDS = ("7", r"\frac{1}{2}", r"(-\infty,3]", r"\{1,2\}", "x^2+1", r"\begin{pmatrix}1\\2\end{pmatrix}")
SCRIPTS = st.lists(
    st.sampled_from(
        [
            *(
                "intros.",
                "auto. ",
                "Qed. ",
                "Proof. ",
                "Lemma t : True. ",
                "Theorem t : True. ",
                "Axiom a : False. ",
            ),
            *("(*", "*)", '"', ". ", "...", "- ", "{ ", "} ", "2: ", "all: ", "#[", "]", "\n", "admit", "x"),
            *("/-", "-/", "--", "theorem t : True := by", "sorry", "exact ", "by\n", "```", "\u00ab"),
        ]
    ),
    max_size=14,
).map("".join)


def check_answer(text: str, gold: str) -> None:
    verify = registry.get("math").verify
    begin = time.monotonic()
    for response in (text, rf"\boxed{{{text}}}", f"Answer: {text}"):
        assert verify(response, gold, {}) in (0.0, 1.0)
    assert time.monotonic() - begin < 30.0


def check_readers(text: str) -> None:
    for source in Source:
        answer_text(FinalAnswer(text, source))
    with contextlib.suppress(UnreadableError):
        assert read(canonical(text)) == read(canonical(text))


def check_script(text: str) -> None:
    with contextlib.suppress(RejectedError):
        proof = read_proof(text, "t", "")
        for sentence in (*proof.helpers, *proof.body):
            assert not re.match(r"\W*Axiom\b", sentence) and not re.search(r"\badmit\b", sentence)
    with contextlib.suppress(RejectedError):
        body = read_body(f"```lean\n{text}\n```", "t")
        assert "sorry" not in body.split() and "axiom" not in body.split()


@settings(deadline=None, max_examples=60)
@given(TEXTS, st.sampled_from(GOLDS))
def test_any_text_is_graded(text: str, gold: str) -> None:
    check_answer(text, gold)


@settings(deadline=None, max_examples=300)
@given(TEXTS)
def test_any_text_is_read_or_refused(text: str) -> None:
    check_readers(text)


@settings(deadline=None, max_examples=300)
@given(SCRIPTS)
def test_any_script_is_read_or_refused(text: str) -> None:
    check_script(text)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@settings(deadline=None, max_examples=20_000)
@given(TEXTS, st.sampled_from(GOLDS))
def test_many_texts_are_graded(text: str, gold: str) -> None:
    check_answer(text, gold)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@settings(deadline=None, max_examples=100_000)
@given(TEXTS, SCRIPTS)
def test_many_texts_are_read_or_refused(text: str, script: str) -> None:
    check_readers(text)
    check_script(script)
