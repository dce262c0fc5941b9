"""Grids, lists, points, form, and rewards of several terms."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copd_megatron.config.schema import RewardConfig
from copd_megatron.data.samples import SampleRef, sample_from_record
from copd_megatron.errors import BadSampleError
from copd_megatron.metrics.reduction import Metrics
from copd_megatron.metrics.step_clock import StepClock
from copd_megatron.records import LARGEST_REWARD
from copd_megatron.rewards import Grader, UnknownVerifierError, registry
from copd_megatron.rewards.parsing.rows import read_grid, read_items
from copd_megatron.rewards.parsing.syntax import NotUnderstoodError
from copd_megatron.rewards.terms import Term, terms_of
from copd_megatron.rewards.verifiers.point import one_point
from copd_megatron.samples.record import from_line, rounded, to_line
from tests.support.rollouts import rollout
from tests.test_samples import make


def grade(name: str, response: str, answer: str, **metadata: Any) -> float:
    return registry.get(name).verify(response, answer, metadata)


# ---- grid and list ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("Answer: [[1, 2], [3, 4]]", 1.0),
        ("<answer>1 2\n3 4</answer>", 1.0),
        ("Answer:\n```\n1 2\n3 4\n```", 1.0),
        ("<answer>| 1 | 2 |\n|---|---|\n| 3 | 4 |</answer>", 1.0),
        ("<answer>12\n34</answer>", 1.0),
        ("<answer>1, 2\n3, 4.0</answer>", 1.0),
        ("Answer: [['1', '2'], ('3', 4)]", 1.0),
        ("Answer: [[1, 2], [3, 5]]", 0.75),
        ("Answer: [[1, 2]]", 0.0),
        ("Answer: [[1, 2], [3]]", 0.0),
        ("Answer: [1, 2, 3, 4]", 0.0),
        ("Answer: [[1, [2]], [3, 4]]", 0.0),
        ("Answer: [[1, 2], [3, 4]] or [[1, 2], [3, 5]]", 0.0),
        ("Answer: [[1, 2], [3, 4]", 0.0),
        ("", 0.0),
        ("<think>[[1, 2], [3, 4]]", 0.0),
    ],
)
def test_grid(response: str, reward: float) -> None:
    assert grade("grid", response, "[[1, 2], [3, 4]]", partial=True) == reward
    assert grade("grid", response, "1 2\n3 4") == float(reward == 1.0)


@pytest.mark.parametrize(
    ("response", "ordered", "any_order", "share", "share_any"),
    [
        ("Answer: [red, Blue, 3]", 0.0, 0.0, 0.0, 0.0),  # neither notation: words without quotes
        ("Answer: red, Blue, 3.0", 1.0, 1.0, 1.0, 1.0),
        ('Answer: ["red", "blue", 3]', 1.0, 1.0, 1.0, 1.0),
        ("<answer>1. red\n2. blue\n3. 3</answer>", 1.0, 1.0, 1.0, 1.0),
        ("Answer: blue, red, 3", 0.0, 1.0, 1 / 3, 1.0),
        ("Answer: red, blue, 3, green", 0.0, 0.0, 0.75, 0.75),
        ("Answer: red", 0.0, 0.0, 1 / 3, 1 / 3),
        ("Answer: red, red, red", 0.0, 0.0, 1 / 3, 1 / 5),
        ("Answer: 3, 3, blue, blue, red, red, x, y", 0.0, 0.0, 0.0, 3 / 8),
        ("", 0.0, 0.0, 0.0, 0.0),
    ],
)
def test_list(response: str, ordered: float, any_order: float, share: float, share_any: float) -> None:
    gold = '["red", "blue", 3]'
    assert grade("list", response, gold) == ordered
    assert grade("list", response, gold, ordered=False) == any_order
    assert grade("list", response, gold, partial=True) == pytest.approx(share)
    assert grade("list", response, gold, partial=True, ordered=False) == pytest.approx(share_any)


@pytest.mark.parametrize(("verifier", "gold"), [("grid", "[[1], [2, 3]]"), ("grid", ""), ("list", "")])
def test_bad_rows_are_an_error_of_the_sample(verifier: str, gold: str) -> None:
    with pytest.raises(ValueError):
        grade(verifier, "Answer: 1", gold)


# ---- point ------------------------------------------------------------------------------------------------

BOX = "[100, 50, 200, 150]"


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("Answer: (150, 100)", 1.0),
        ('```json\n[{"point_2d": [150, 100], "label": "cat"}]\n```', 1.0),
        ('<point x="150" y="100">cat</point>', 1.0),
        ("Answer: 150, 100", 1.0),
        ("Answer: [200, 150]", 1.0),
        ("Answer: [201, 150]", 0.0),
        ("Answer: (150, 100) or (500, 500)", 0.0),
        ("Answer: (10, 10), (150, 100)", 0.0),
        ("Answer: [100, 50, 200, 150]", 0.0),
        ("Answer: (nan, 100)", 0.0),
        ("Answer: (1e2, 100)", 0.0),
        ("Answer: 150", 0.0),
        ("", 0.0),
    ],
)
def test_point_in_a_box(response: str, reward: float) -> None:
    assert grade("point", response, BOX) == reward


def test_point_near_a_point() -> None:
    assert grade("point", "(103, 54)", "[100, 50]", max_distance=5) == 1.0
    assert grade("point", "(104, 54)", "[100, 50]", max_distance=5) == 0.0
    assert grade("point", "(103, 54)", "[100, 50]", max_distance=10, partial=True) == 0.5
    assert grade("point", "(300, 54)", "[100, 50]", max_distance=10, partial=True) == 0.0


def test_points_in_thousandths_of_the_image() -> None:
    size = {"scale": "thousandths", "image_size": [2000, 500]}
    assert grade("point", "(75, 200)", BOX, **size) == 1.0
    assert grade("point", "(150, 100)", BOX, **size) == 0.0
    assert grade("point", "(7.5, 20)", BOX, **{**size, "scale": "percent"}) == 1.0


@pytest.mark.parametrize(
    ("gold", "metadata"),
    [
        ("nowhere", {}),
        ("[1, 2]", {}),
        ("[1, 2]", {"max_distance": 0}),
        ("[1, 2]", {"max_distance": float("nan")}),
        (BOX, {"scale": "thousandths"}),
        (BOX, {"scale": "thousandths", "image_size": [0, 1]}),
        (BOX, {"scale": "miles"}),
    ],
)
def test_bad_points_are_an_error_of_the_sample(gold: str, metadata: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        grade("point", "(1, 2)", gold, **metadata)


# ---- format -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "parts"),
    [
        ("<think>I add.</think>The result is $\\boxed{4}$.", (1, 1, 1)),
        ("<think>I add.</think>\n<answer>4</answer>\n", (1, 1, 1)),
        ("<think>I add.</think>\nAnswer: 4", (1, 1, 1)),
        ("<think>I add.</think>\n**Answer: 4**", (1, 1, 1)),
        ("<think>I add.</think>\\boxed{4} I am sure.", (1, 1, 0)),
        ("<think>I add.</think>Answer: 4\nI am sure.", (1, 1, 0)),
        ("<think>I add.</think>4", (1, 0, 0)),
        ("\\boxed{4}", (0, 1, 1)),
        ("<think></think>\\boxed{4}", (0, 1, 1)),
        ("Hm. <think>I add.</think>\\boxed{4}", (0, 1, 1)),
        ("<think>a</think><think>b</think>\\boxed{4}", (0, 1, 1)),
        ("<think>\\boxed{4}", (0, 0, 0)),
        ("<think>a</think>\\boxed{4", (1, 0, 0)),
        ("", (0, 0, 0)),
    ],
)
def test_format(response: str, parts: tuple[int, int, int]) -> None:
    for name, met in zip(("thinking", "answer", "end"), parts, strict=True):
        assert grade("format", response, "ignored", parts=[name]) == met, name
    assert grade("format", response, "") == float(all(parts))
    assert grade("format", response, "", partial=True) == pytest.approx(sum(parts) / 3)


def test_format_of_a_style() -> None:
    assert grade("format", "\\boxed{4}", "", parts=["answer"], style="tag") == 0.0
    assert grade("format", "<answer>4</answer>", "", parts=["answer"], style="tag") == 1.0
    for wrong in ({"parts": ["spelling"]}, {"style": "latex"}, {"parts": []}):
        with pytest.raises(ValueError, match="knows the parts"):
            grade("format", "4", "", **wrong)


# ---- several terms ----------------------------------------------------------------------------------------

TERMS = {
    "terms": [
        {"verifier": "numeric", "weight": 0.8},
        {"verifier": "format", "weight": 0.2, "metadata": {"parts": ["answer", "end"]}},
    ]
}
RESPONSES = {"Answer: 4": 1.0, "It is 4": 0.8, "Answer: 5": 0.2, "5": 0.0}


@pytest.mark.parametrize("response", RESPONSES)
def test_a_sample_with_terms(response: str) -> None:
    expected = pytest.approx(RESPONSES[response])
    assert grade("weighted", response, "4", **TERMS) == expected
    with Grader(RewardConfig(verifiers=["weighted", "numeric", "format"])) as grader:
        (graded,) = grader.grade([rollout(response, "4", "weighted", TERMS)])
        assert graded.reward == expected and graded.prompt.verifier == "weighted"
        assert grader.counters() == {"graded": 1, "failed": 0}


def test_terms_of_a_branch() -> None:
    config = RewardConfig(verifiers=["numeric", "math"], terms={"sample": 0.9, "format": 0.1})
    texts = ["<think>.</think>Answer: 4", "Answer: 4", "<think>.</think>Answer: 5"]
    with Grader(config, terms=config.terms) as shaped, Grader(config) as plain:
        for verifier in ("numeric", "math"):
            rollouts = [rollout(text, "4", verifier, key=text) for text in texts]
            assert [r.reward for r in shaped.grade(rollouts)] == pytest.approx([1.0, 0.9, 0.1])
            assert [r.reward for r in plain.grade(rollouts)] == [1.0, 1.0, 0.0]
            assert [r.reward for r in shaped.grade(rollouts, {})] == [1.0, 1.0, 0.0], "by the sample's alone"


def test_every_reward_that_a_grader_gives_can_be_read_back_from_the_samples(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Of a verifier, and of several whose weighted sum alone is too large."""
    shaped = RewardConfig(verifiers=["numeric"], terms={"sample": 1e9, "format": 1e9})
    responses = [rollout("<think>.</think>Answer: 4", "4", "numeric"), rollout("Answer: 4", "4", "numeric")]
    with Grader(shaped, terms=shaped.terms) as grader:
        too_much, most = (r.reward for r in grader.grade(responses))
        assert grader.counters()["failed_numeric_bad_value"] == 1
    assert (
        "verifier 'numeric' failed" in caplog.text and "returned 2000000000.0; a reward lies" in caplog.text
    )
    assert (too_much, most) == (0.0, LARGEST_REWARD)
    sample = make(reward=most, student=rounded([-LARGEST_REWARD]), teacher=rounded([-1e10]))
    again = from_line(to_line(sample), "here")
    assert (again.reward, again.student, again.teacher) == (most, [-LARGEST_REWARD], [None])


def test_evaluations_in_a_run_grade_by_the_samples_verifier(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever shapes the branch's training rewards: figures of different branches are compared."""
    from copd_megatron.branch import validation

    found = [rollout("Answer: 4", "4", "numeric")]
    with Grader(RewardConfig(verifiers=["numeric"]), terms={"sample": 0.5, "format": 0.5}) as grader:

        def sample(me: Any, *_: Any, terms: Any = None, **__: Any) -> Any:
            return me.grader.grade(found, terms)

        monkeypatch.setattr(validation, "sample_graded", sample)
        settings = SimpleNamespace(num_generations=1)
        monkeypatch.setattr(validation, "sampling_settings", lambda *_: settings)
        monkeypatch.setattr("copd_megatron.evaluation.run.sampling_settings", lambda *_: settings)
        me = SimpleNamespace(
            name="text",
            config=None,
            engine=SimpleNamespace(llm=SimpleNamespace(reset_prefix_cache=lambda: None), num_replicas=1),
            validation={"text": [found[0].prompt]},
            samples=SimpleNamespace(write_evaluation=lambda *_: None),
            grader=grader,
            metrics=Metrics(),
            num_sampled_tokens=0,
            clock=StepClock(),
            solved={},
        )
        assert validation._accuracy(me, "text", ["text"]) == {"text": 1.0}  # type: ignore[arg-type]


def test_a_term_that_fails_costs_its_share_and_is_counted() -> None:
    terms = {"sample": 0.5, "choice": 0.5}
    with Grader(RewardConfig(verifiers=["numeric"]), terms=terms) as grader:
        (graded,) = grader.grade([rollout("Answer: 4", "4", "numeric")])
        assert graded.reward == 0.5
        assert grader.counters() == {"graded": 1, "failed": 1, "failed_choice_error": 1}


def test_unknown_terms_are_refused() -> None:
    with pytest.raises(UnknownVerifierError, match="Did you mean 'format'"):
        Grader(RewardConfig(), terms={"sample": 1.0, "fromat": 0.1})


def test_how_terms_are_combined() -> None:
    own = (Term(verifier="math", weight=1.0),)
    assert terms_of("math", {}) == own == terms_of("math", {"terms": 3})
    combined = terms_of("weighted", TERMS, {"sample": 0.5, "exact": -1.0})
    assert [(term.verifier, term.weight) for term in combined] == [
        ("numeric", 0.4),
        ("format", 0.1),
        ("exact", -1.0),
    ]


@pytest.mark.parametrize(
    "terms",
    [
        None,
        [],
        "math",
        [{"verifier": "numeric"}],
        [{"verifier": "numeric", "weight": "1"}],
        [{"verifier": "numeric", "weight": True}],
        [{"verifier": "numeric", "weight": float("inf")}],
        [{"verifier": "weighted", "weight": 1}],
        [{"verifier": "math", "weight": 1}],
        [{"verifier": "numeric", "weight": 1, "extra": 1}],
        [{"verifier": "numeric", "weight": 1, "answer": 4}],
        [{"verifier": "numeric", "weight": 1, "metadata": []}],
    ],
)
def test_bad_terms_are_refused_when_a_sample_is_read(terms: Any) -> None:
    record = {"prompt": "2 + 2?", "answer": "4", "verifier": "weighted", "metadata": {"terms": terms}}
    with pytest.raises(BadSampleError, match="term"):
        sample_from_record(record, SampleRef("a", "0"), "a sample", verifiers=["weighted", "numeric"])


# ---- any text ---------------------------------------------------------------------------------------------

TEXTS = st.one_of(
    st.text(max_size=80),
    st.text(alphabet="[](){},.;:-|'\"0123456789abxyeE \n\t\\/<>=", max_size=80),
)


def check_readers(text: str) -> None:
    for read in (read_items, read_grid):
        with contextlib.suppress(NotUnderstoodError):
            assert read(text) == read(text)
    assert one_point(text) == one_point(text)
    for name, gold in (("grid", "[[7.5, 1]]"), ("list", "[7.5, 1]"), ("point", BOX), ("format", "")):
        assert 0.0 <= grade(name, text, gold, partial=True) <= 1.0


@settings(deadline=None)
@given(TEXTS)
def test_readers_take_any_text(text: str) -> None:
    check_readers(text)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(deadline=None, max_examples=100_000)
@given(TEXTS)
def test_readers_take_many_texts(text: str) -> None:
    check_readers(text)


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(-99, 99), min_size=2, max_size=2), min_size=1, max_size=6))
def test_grids_are_read_back(rows: list[list[int]]) -> None:
    lines = "\n".join(" ".join(map(str, row)) for row in rows)
    assert read_grid(lines) == read_grid(str(rows)) == [[str(cell) for cell in row] for row in rows]
    assert grade("grid", f"Answer: {rows}", lines) == 1.0
