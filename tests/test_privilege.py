"""What a teacher reads besides its student's prompt: texts, their place, and what is kept from leaking."""

from __future__ import annotations

import numpy as np
import pytest

from copd_megatron.config.schema import FeedbackConfig
from copd_megatron.data.stream import encode_prompt
from copd_megatron.errors import DataError
from copd_megatron.opd.privilege import (
    Splicer,
    context_text,
    names_a_concept,
    others_correct,
    without_answer,
)
from tests.support.byte_tokenizer import byte_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</{{ m['role'] }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_a_context_stands_at_the_end_of_the_users_message(template: str | None) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    splicer = Splicer(tokenizer)
    prompt = encode_prompt(tokenizer, "What is 1 + 1?")
    spliced = splicer.splice(prompt, "\n\nHint.")
    assert spliced.tolist() == encode_prompt(tokenizer, "What is 1 + 1?\n\nHint.").tolist()
    assert spliced.dtype == np.int32
    assert splicer.splice(prompt, "").tolist() == prompt.tolist()
    assert "Hint." in splicer.text(spliced)


def test_a_prompt_that_ends_otherwise_has_no_place_for_it() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    prompt = encode_prompt(tokenizer, "What is 1 + 1?")
    with pytest.raises(DataError, match="its last message must be the user's"):
        Splicer(tokenizer).splice(prompt[:-3], "x")


def test_paragraphs_whose_part_is_missing_are_left_out() -> None:
    template = FeedbackConfig().context_prompt
    both = context_text(template, solution="1 + 1 = 2", feedback="Count again.")
    assert "1 + 1 = 2" in both and "Count again." in both and both.startswith("\n\n")
    alone = context_text(template, solution=None, feedback="Count again.")
    assert (
        "correct solution" not in alone and "{" not in alone and alone.endswith("solve the problem yourself.")
    )
    assert "comment" not in context_text(template, solution="1 + 1 = 2", feedback=None)


def test_braces_of_a_solution_are_text() -> None:
    text = context_text("A:\n{solution}", solution=r"\frac{1}{2} {feedback} {0}", feedback=None)
    assert text == "A:\n\\frac{1}{2} {feedback} {0}"


PROBLEM = "A train covers 120 km at constant speed. What is its average speed?"


@pytest.mark.parametrize(
    ("feedback", "names"),
    [
        ("Concept: average speed\nYou divided the wrong way round.", True),
        ("**Concept:** Average  SPEED.\nGood.", True),
        ("concept: momentum\nWrong.", False),
        ("Concept:\nWrong.", False),
        ("average speed", False),
        ("You forgot it.\nConcept: average speed", False),
        ("", False),
    ],
)
def test_a_concept_is_one_if_the_problem_names_it(feedback: str, names: bool) -> None:
    assert names_a_concept(feedback, PROBLEM) is names


@pytest.mark.parametrize(
    ("feedback", "gold", "kept"),
    [
        ("You are close. The answer is 60. Check the units.", "60", "You are close. Check the units."),
        ("It is 160 and 600.", "60", "It is 160 and 600."),
        ("So \\boxed{60}.", "60", ""),
        ("It is 60", "60", ""),
        ("The answer is (60).\nMind the units.", "60", "Mind the units."),
        ("It is the Eiffel   tower!", "Eiffel Tower", ""),
        ("Nothing of the kind.", "", "Nothing of the kind."),
    ],
)
def test_sentences_that_state_the_answer_are_left_out(feedback: str, gold: str, kept: str) -> None:
    assert without_answer(feedback, gold) == kept


def test_a_response_is_not_its_own_solution() -> None:
    assert others_correct([True, False, True], 0) == [2]
    assert others_correct([True, False, True], 1) == [0, 2]
    assert others_correct([True, False, False], 0) == []
