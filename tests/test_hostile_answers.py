"""Hostile answers against every verifier and every reasoning-gym family: nothing runs, hangs or scores."""

from __future__ import annotations

import functools
import importlib
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copd_megatron.config.schema import RewardConfig
from copd_megatron.data.convert.jsonl import FieldMap, convert_jsonl
from copd_megatron.errors import DataError
from copd_megatron.rewards import Grader, registry
from copd_megatron.rewards.audit import Case, audit
from copd_megatron.rewards.final_answer import final_answer, normalize
from copd_megatron.rewards.reasoning_gym_scores import (
    REFUSED,
    SCORED_BY_LIBRARY,
    SCORED_HERE,
    UnreadFamilyError,
    score,
)
from copd_megatron.rewards.verifiers.reasoning_gym import library
from copd_megatron.samples.audit import read_cases
from tests.support.hostile_answers import CODE, HOSTILE
from tests.support.rollouts import rollout

FAMILIES = sorted({*SCORED_HERE, *SCORED_BY_LIBRARY})
INLINE = {
    "exact": "blue",
    "numeric": "7.5",
    "choice": "A",
    "box_iou": "[1, 2, 3, 4]",
    "temporal_iou": "1.5-3",
    "grid": "[[7.5, 1], [2, 3]]",
    "list": "[7.5, 1]",
    "point": "[100.5, 50, 200, 150]",
}


@pytest.fixture(scope="module")
def gym() -> Any:
    return library()


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    config = RewardConfig(verifiers=["reasoning_gym", "math", *INLINE], timeout_seconds=20.0, num_workers=2)
    with Grader(config) as grader:
        yield grader


def entry_of(gym: Any, family: str, seed: int = 5) -> dict[str, Any]:
    """A task as it comes out of a shard."""
    tasks = gym.create_dataset(family, seed=seed, size=8)
    # some golds of the library leave the integral for the reader
    task = next(task for task in tasks if "Integral" not in str(task["answer"]))
    entry = json.loads(json.dumps(task))
    entry["answer"] = str(entry["answer"])
    return dict(entry)


def hostile_texts(mark: Path) -> dict[str, str]:
    return {
        name: text.format(mark=mark) if name.startswith("code") else text for name, text in HOSTILE.items()
    }


# ---------------------------------------------------------------- reasoning_gym


def test_every_installed_family_has_been_read(gym: Any) -> None:
    families = importlib.import_module("reasoning_gym.factory").DATASETS
    installed = {name for name, (made, _) in families.items() if made.__module__.startswith("reasoning_gym.")}
    listed = [*SCORED_HERE, *SCORED_BY_LIBRARY, *REFUSED]
    assert installed == set(listed) and len(listed) == len(set(listed))


EVALUATING = re.compile(
    r"(?<![\w.])(?:eval|exec|__import__|compile)\(|parse_expr\(|sympify\(|lambdify\(|pickle|import_module"
    r"|subprocess|os\.system|yaml\.(?:unsafe_)?load\("
)
NOT_OF_AN_ANSWER = {
    "algorithmic/binary_matrix.py": "scored here",
    "algorithmic/number_sorting.py": "scored here",
    "algorithmic/spiral_matrix.py": "scored here",
    "algorithmic/string_insertion.py": "scored here",
    "algebra/intermediate_integration.py": "scored here",
    "algebra/polynomial_multiplication.py": "scored here",
    "algebra/simple_integration.py": "scored here",
    "arithmetic/basic_arithmetic.py": "evaluates the task that it is making",
    "arithmetic/bitwise_arithmetic.py": "scored here",
    "arithmetic/gsm_symbolic/generators_00_49.py": "evaluates a fraction of its own",
    "arithmetic/gsm_symbolic/generators_50_99.py": "evaluates a fraction of its own",
    "code/codeio.py": "runs the library's programs when it makes a task",
    "code/contrib/bfit/Compiler/Compiler.py": "a compiler's main function",
    "games/countdown.py": "scored here",
    "games/n_queens.py": "scored here",
    "games/puzzle24.py": "scored here",
    "logic/propositional_logic.py": "a parser of its own that is called parse_expr",
}
"""Files of the library that evaluate something, and why no answer gets there."""


def test_nothing_else_in_the_library_evaluates(gym: Any) -> None:
    root = Path(gym.__file__).parent
    found = {
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        if EVALUATING.search(re.sub(r"re\.compile", "", path.read_text(encoding="utf-8")))
    }
    assert found == set(NOT_OF_AN_ANSWER)


@pytest.mark.parametrize("family", FAMILIES)
def test_hostile_answers_to_every_family(gym: Any, grader: Grader, family: str, tmp_path: Path) -> None:
    entry, mark = entry_of(gym, family), tmp_path / "mark"
    metadata = {"dataset": family, "question": entry["question"], "entry": entry["metadata"]}
    texts = hostile_texts(mark)
    rollouts = [
        rollout(f"<answer>{text}</answer>", entry["answer"], "reasoning_gym", metadata, key=name)
        for name, text in texts.items()
    ]
    before = grader.counters()
    rewards = {r.prompt.prompt_id.partition("/")[2]: r.reward for r in grader.grade(rollouts)}
    assert not mark.exists()
    new = {name: count - before.get(name, 0) for name, count in grader.counters().items() if name != "graded"}
    assert {name: count for name, count in new.items() if count} == {}, "each is read, and wrong"
    right = {name for name, text in texts.items() if same(text, entry["answer"])}
    assert {name for name, reward in rewards.items() if reward} <= right


def same(text: str, gold: str) -> bool:
    """Whether a hostile answer happens to be right: ``[]`` for an empty list, 1_0 for 10."""
    text, gold = normalize(text).replace("_", ""), normalize(gold)
    digits = text.isdecimal() and gold.isdecimal() and len(text) < 99
    return text == gold or (digits and int(text) == int(gold))


NOT_FROM_JSON = {"arc_agi", "rearc"}
"""Families that compare the answer with tuples of tuples, which a sample's JSON gives back as lists."""


@pytest.mark.parametrize("family", FAMILIES)
def test_gold_answers_to_every_family(gym: Any, family: str) -> None:
    entry = entry_of(gym, family)
    expected = float(gym.get_score_answer_fn(family)(entry["answer"], entry))
    has_one_answer = entry["answer"] != "None" and family not in NOT_FROM_JSON
    assert expected > 0.999 or not has_one_answer
    assert score(family, entry["answer"], entry, gym.get_score_answer_fn) == expected


@pytest.mark.parametrize("family", sorted(SCORED_HERE))
def test_scores_here_are_those_of_the_library(gym: Any, family: str) -> None:
    scorer = gym.get_score_answer_fn(family)
    for task in gym.create_dataset(family, seed=11, size=12):
        entry = json.loads(json.dumps(task))
        if "Integral" in entry["answer"] or family == "game_of_life_halting":
            continue  # see the holes below
        for answer in variants(family, entry):
            found = score(family, answer, entry, gym.get_score_answer_fn)
            assert found == pytest.approx(scorer(answer, entry)), (answer, entry["answer"])


def variants(family: str, entry: dict[str, Any]) -> Iterator[str]:
    """Right, nearly right and wrong answers that the library reads as they are meant."""
    gold = entry["answer"]
    rows = [row.split() for row in gold.split("\n")]
    yield from (gold, f" {gold} ", gold[::-1], "nonsense")
    match family:
        case "binary_matrix" | "n_queens":
            yield from (str(rows), str([[int(c) if c.isdigit() else c for c in row] for row in rows]))
        case "spiral_matrix":
            yield from (str(gold.split()), str([int(item) for item in gold.split()]), str(gold.split()[::-1]))
        case "string_insertion":
            yield from (str(list(gold)), str(list(gold)[1:]))
        case "countdown" | "puzzle24":
            yield from (f"({gold})/1", f"({gold})", "1 + 1", "7 * 8 * 9 * 1")
        case "bitwise_arithmetic":
            yield from (str(int(gold, 0)), gold.upper().replace("X", "x"), str(int(gold, 0) + 1))
        case "number_sorting":
            numbers = json.loads(gold.replace("'", '"'))
            yield from (json.dumps(numbers), json.dumps(numbers[::-1]), json.dumps(numbers[1:]), str(numbers))
        case "simple_integration" | "intermediate_integration":
            yield from (gold.replace("C", "7"), gold.replace(" + C", ""), f"{gold} + x", f"-({gold})")
        case "polynomial_multiplication":
            yield from (f"({gold})", f"{gold} + 1", f"{gold} + 0*x")


def tighter(family: str, answer: str, **metadata: Any) -> float:
    entry = {"question": "", "answer": "False", "metadata": metadata}
    return score(family, answer, entry, library().get_score_answer_fn)


def test_holes_of_the_library_are_closed() -> None:
    numbers = {"numbers": [2, 3, 4, 5]}
    assert tighter("puzzle24", "6 * 4 * 1 * 1", **numbers) == 0.01, "numbers of another puzzle"
    assert tighter("puzzle24", "5 * 5 - 5 / 7", **numbers) == 0.01, "24.28 is not 24"
    assert tighter("puzzle24", "2 * 3 * 4 * (5 - 4)", **numbers) == 0.01
    assert tighter("puzzle24", "(5 + 3 - 2) * 4", **numbers) == 1.0
    assert tighter("countdown", "2 ** 3", numbers=[2, 3], target=8) == 0.01
    assert (
        tighter("game_of_life_halting", "anything") == 0.0 and tighter("game_of_life_halting", "false") == 1.0
    )
    integral = {"integrand": "2*x", "variable": "x"}
    assert tighter("simple_integration", "Integral(2*x, x)", **integral) == 0.0
    assert tighter("simple_integration", "x**2 + C", **integral) == 1.0
    assert tighter("complex_arithmetic", "nan", result=[1.0, 2.0]) == 0.0
    assert tighter("complex_arithmetic", "1 + 2i", result=[1.0, 2.0]) == 1.0


def test_an_equation_without_solutions(gym: Any) -> None:
    empty = {"question": "", "answer": "", "metadata": {}}
    for answer, expected in (("", 1.0), ('""', 1.0), ("I like cheese", 0.0), ("1.5", 0.0)):
        assert score("polynomial_equations", answer, empty, gym.get_score_answer_fn) == expected


def test_the_sample_is_not_evaluated_either(gym: Any, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    code = CODE["open"].format(mark=mark)
    entry = {
        "question": "",
        "answer": code,
        "metadata": {"problem": code, "integrand": code, "variable": "x"},
    }
    entry["metadata"] |= {"direction": "ascending", "numbers": [1], "target": 1, "valid_answers": [code]}
    for family in SCORED_HERE:
        for answer in ("1", code, "[1]"):
            assert score(family, answer, entry, gym.get_score_answer_fn) <= 1.0
    assert not mark.exists()


def test_families_that_nobody_has_read_are_refused(gym: Any) -> None:
    for family in ("composite", "a_family_of_the_next_version"):
        with pytest.raises(UnreadFamilyError, match=f"{family!r} is refused"):
            score(family, "1", {"question": "", "answer": "1", "metadata": {}}, gym.get_score_answer_fn)


def test_a_sample_that_cannot_be_graded_is_an_error_and_no_zero(gym: Any) -> None:
    with pytest.raises(KeyError):
        score("rubiks_cube", "U", {"question": "", "answer": "R", "metadata": {}}, gym.get_score_answer_fn)


# ---------------------------------------------------------------- the other verifiers


def test_hostile_answers_to_the_other_verifiers(grader: Grader, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    golds = INLINE | {"math": "7"}
    forms = ("{}", "<answer>{}</answer>", "\\boxed{{{}}}", "Answer: {}", "${}$")
    rollouts = [
        rollout(form.format(text), gold, verifier, key=f"{verifier} {name}")
        for verifier, gold in golds.items()
        for name, text in hostile_texts(mark).items()
        for form in forms
    ]
    before = grader.counters()
    rewarded = [(r.prompt.prompt_id, r.text[:50]) for r in grader.grade(rollouts) if r.reward]
    assert not mark.exists()
    failed = {name: count - before.get(name, 0) for name, count in grader.counters().items() if "_" in name}
    assert not any(count for name, count in failed.items() if "crash" in name or "timeout" in name)
    assert rewarded == []


PIECES = st.sampled_from(
    [
        *(
            "[",
            "]",
            "(",
            ")",
            "{",
            "}",
            ",",
            ":",
            "'",
            '"',
            "$",
            "^",
            "**",
            "*",
            "+",
            "-",
            "/",
            ".",
            " ",
            "\n",
        ),
        *(
            "1",
            "9",
            "99999",
            "0x",
            "e9",
            "!",
            "%",
            "<<",
            "|",
            "&",
            "~",
            "=",
            "<",
            ";",
            "x",
            "sin(",
            "exp(",
            "or",
        ),
        *("__import__(", "lambda:", "open(", "eval(", ".__class__", " if ", " for x in ", "\0", "\ud800"),
        *(
            "exp(",
            "or",
            "Answer:",
            "<answer>",
            "</answer>",
            "<think>",
            "</think>",
            "answer is",
            "```",
            "true",
        ),
        *("null", "nan", "inf", "Integral(", "Symbol(", "factorial(", "\u0663", "\u202e"),
        *("\\boxed{", "\\frac{", "\\text{", "\\sqrt{", "\\pi", "\\{", "\\}"),
    ]
)
TEXTS = st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=25).map("".join))


def check_inline_verifiers(text: str) -> None:
    assert final_answer(text).text == final_answer(text).text.strip()
    for verifier, gold in INLINE.items():
        reward = registry.get(verifier).verify(text, gold, {})
        assert 0.0 <= reward <= 1.0
        assert registry.get(verifier).verify(text, gold, {}) == reward


@functools.cache
def task_of(family: str) -> dict[str, Any]:
    return entry_of(library(), family)


def check_family(family: str, text: str) -> None:
    task, scorers = task_of(family), library().get_score_answer_fn  # made and imported once
    begin = time.process_time()
    assert 0.0 <= score(family, text, task, scorers) <= 1.0
    assert time.process_time() - begin < 20.0, "the machine may be busy: processor seconds count"


@given(TEXTS)
def test_fuzzed_answers_to_the_inline_verifiers(text: str) -> None:
    check_inline_verifiers(text)


@settings(deadline=None, max_examples=60)
@given(family=st.sampled_from(sorted(SCORED_HERE)), text=TEXTS)
def test_fuzzed_answers_to_the_families_that_are_scored_here(family: str, text: str) -> None:
    check_family(family, text)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@settings(deadline=None, max_examples=20_000)
@given(text=TEXTS)
def test_many_fuzzed_answers_to_the_inline_verifiers(text: str) -> None:
    check_inline_verifiers(text)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@settings(deadline=None, max_examples=20_000)
@given(family=st.sampled_from(FAMILIES), text=TEXTS)
def test_many_fuzzed_answers_to_every_family(family: str, text: str) -> None:
    check_family(family, text)


# ---- verifiers that data name ----------------------------------------------------------------------------


@pytest.mark.parametrize("inside_terms", [False, True], ids=["verifier", "term"])
@pytest.mark.parametrize("what", ["convert", "unchecked", "audit", "run"])
def test_a_function_that_data_name_is_not_called(what: str, inside_terms: bool, tmp_path: Path) -> None:
    """``os:mkdir`` stands for any function of the library, called with a response or answer as its path."""
    made = tmp_path / "made"
    row: dict[str, Any] = {"prompt": "p", "answer": str(made), "response": str(made), "verifier": "os:mkdir"}
    if inside_terms:
        row |= {"verifier": "weighted", "metadata": {"terms": [{"verifier": "os:mkdir", "weight": 1}]}}
    source = tmp_path / "lines.jsonl"
    source.write_text(json.dumps(row) + "\n")
    with pytest.raises((DataError, registry.UnknownVerifierError), match=r"'os:mkdir'.*--allow-verifier"):
        if what == "audit":
            audit(read_cases(source).cases)
        elif what == "run":
            case = Case(
                name="received", prompt="", response=str(made), answer="", verifier=row["verifier"],
                metadata=row.get("metadata", {}), terms={} if inside_terms else {"os:mkdir": 1.0},
            )  # fmt: skip
            audit([case])
        else:
            convert_jsonl([source], tmp_path / "out", "mine", FieldMap(), check_golds=what == "convert")
    assert not made.exists()
    with pytest.raises(registry.UnknownVerifierError, match="os:mkdir"):
        registry.get("weighted").verify("", str(made), {"terms": [{"verifier": "os:mkdir", "weight": 1}]})
    assert not made.exists()
