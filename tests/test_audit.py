"""Grading recorded responses again."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copd_megatron.errors import DataError
from copd_megatron.rewards.audit import Audit, Case, Grade, Verdict, audit
from copd_megatron.samples.audit import _without_ends, as_json, as_lines, read_cases
from copd_megatron.samples.files import FOLDER, write_samples
from copd_megatron.samples.record import MAX_TEXT_CHARACTERS, Kind, Sample
from tests.support.commands import ROOT
from tests.support.rollouts import COMMAND

LINES: list[dict[str, Any]] = [
    {"response": "Answer: 4", "answer": "4", "verifier": "numeric", "label": True},
    {"response": "Answer: 5", "answer": "4", "verifier": "numeric", "reward": 0.0},
    {"response": "Answer: five", "expected": "5", "verifier": "numeric", "label": 1, "prompt": "2 + 3?"},
    {"response": "Answer: 6", "answer": "6", "verifier": "exact"},
    {
        "response": "Answer: 1, 2",
        "answer": "[1, 3]",
        "verifier": "list",
        "label": 0.5,
        "metadata": {"partial": True},
    },
    {"response": "Answer: 6", "answer": "six", "verifier": "numeric", "label": False},
]


def jsonl(folder: Path, lines: list[dict[str, Any]]) -> Path:
    path = folder / "labelled.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return path


def sample(**fields: Any) -> Sample:
    common: dict[str, Any] = {
        "step": 3,
        "kind": Kind.native,
        "model": "text",
        "edge": None,
        "domain": "text",
        "prompt_id": "s-000000/7",
        "occurrence": 0,
        "sample_index": 1,
        "prompt": "2 + 2?<think>",
        "gold": "4",
        "verifier": "numeric",
        "metadata": {},
        "media": [],
        "response": "hm</think>Answer: 4<|im_end|>",
        "reward": 1.0,
        "truncated": False,
        "num_prompt_tokens": 3,
        "num_response_tokens": 5,
        "weight_version": 0,
        "seed": 0,
        "lengths": [29],
        "student": [0.0],
    }
    return Sample(**{**common, **fields})


def test_labels_against_verdicts(tmp_path: Path) -> None:
    result = audit(read_cases(jsonl(tmp_path, LINES)).cases)
    assert dict(result.table) == {
        (Grade.right, Grade.right): 1,
        (Grade.wrong, Grade.wrong): 1,
        (Grade.right, Grade.wrong): 1,
        (Grade.unknown, Grade.right): 1,
        (Grade.partial, Grade.partial): 1,
        (Grade.wrong, Grade.failed): 1,
    }
    assert [one.case.name for one in result.disagreements] == ["line 3", "line 6"]
    told = as_json(result)
    assert told["cases"] == 6 and told["disagreements"][0]["prompt"] == "2 + 3?"
    assert 0 < told["milliseconds"]["p50"] <= told["milliseconds"]["p99"]
    text = "\n".join(as_lines(result))
    assert "line 3: label 1, numeric says 0" in text and "line 6: label 0, numeric fails" in text


def test_another_verifier_for_all(tmp_path: Path) -> None:
    cases = read_cases(jsonl(tmp_path, LINES[:3]), verifier="exact").cases
    assert {case.verifier for case in cases} == {"exact"}
    assert [one.reward for one in audit(cases).verdicts] == [1.0, 0.0, 0.0]


def test_a_case_is_graded_as_in_a_run() -> None:
    """In a process that dies or hangs alone, and with terms."""
    terms = {"terms": [{"verifier": "numeric", "weight": 0.5}, {"verifier": "exact", "weight": 0.25}]}
    common: dict[str, Any] = {"prompt": "", "answer": "4", "label": 0.75}
    cases = [
        Case(name="crash", response="die", verifier=COMMAND, **common),
        Case(name="terms", response="Answer: 4", verifier="weighted", metadata=terms, **common),
        Case(name="cut", response="so 4", verifier="numeric", truncated=True, **common),
    ]
    crash, weighted, cut = audit(cases, trusted=[COMMAND]).verdicts
    assert crash.failed and crash.disagrees
    assert weighted.reward == 0.75 and not weighted.disagrees
    assert cut.reward == 0.0 and not cut.failed


def test_the_samples_of_a_run(tmp_path: Path) -> None:
    kept = [
        sample(),
        sample(reward=0.0, sample_index=2),
        sample(reward=None),
        sample(num_left_out=3, cut_at=1),
        sample(metadata={"left_out": "9999 characters"}),
        sample(gold="4" * MAX_TEXT_CHARACTERS),
    ]
    write_samples(tmp_path / FOLDER / "text", "train", 3, kept)
    found = read_cases(tmp_path)
    cases = found.cases
    assert [case.response for case in cases] == ["hm</think>Answer: 4"] * 2
    assert cases[0].opens_thinking
    assert [(one.name, one.reason) for one in found.left_out] == [
        ("s-000000/7, step 3, response 1", "the run did not grade it"),
        ("s-000000/7, step 3, response 1", "the run kept only a part of the response"),
        ("s-000000/7, step 3, response 1", "the run did not keep the prompt's metadata"),
        ("s-000000/7, step 3, response 1", "the run kept only a part of the gold answer"),
    ]
    assert [one.case.label for one in audit(cases).disagreements] == [0.0]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from(["whole", "cut", "ungraded", "gold", "metadata"]), min_size=1, max_size=12),
    st.none() | st.integers(1, 12),
)
def test_what_is_graded_and_what_is_left_out_add_up(kinds: list[str], limit: int | None) -> None:
    fields: dict[str, dict[str, Any]] = {
        "whole": {},
        "cut": {"num_left_out": 3, "cut_at": 1},
        "ungraded": {"reward": None},
        "gold": {"gold": "4" * MAX_TEXT_CHARACTERS},
        "metadata": {"metadata": {"left_out": "9999 characters"}},
    }
    kept = [sample(prompt_id=f"p/{n}", **fields[kind]) for n, kind in enumerate(kinds)]
    with tempfile.TemporaryDirectory() as folder:
        write_samples(Path(folder) / FOLDER / "text", "train", 3, kept)
        if "whole" not in kinds:
            with pytest.raises(DataError, match=f"Left out: {kinds.count(kinds[0])}, the run .*p/0"):
                read_cases(Path(folder))
            return
        found = read_cases(Path(folder)).first(limit)
    assert len(found.cases) == min(kinds.count("whole"), limit or len(kinds))
    names = [one.name for one in (*found.cases, *found.left_out)]
    assert sorted(names) == sorted(f"p/{n}, step 3, response 1" for n in range(len(kinds)))
    told = as_json(Audit([]), found.left_out)
    assert len(told["left_out"]) == len(found.left_out)
    text = "\n".join(as_lines(Audit([]), found.left_out))
    assert text.endswith("0 cases, 0 disagree; ms per verdict: p50 0.00  p90 0.00  p99 0.00") == (
        not found.left_out
    )
    for reason in {one.reason for one in found.left_out}:
        count = sum(one.reason == reason for one in found.left_out)
        assert f"  {count}, {reason} (p/" in text


@pytest.mark.parametrize(
    "line",
    [
        "no json",
        "[]",
        '{"response": "4", "verifier": "exact"}',
        '{"response": 4, "answer": "4", "verifier": "exact"}',
        '{"response": "4", "answer": "4"}',
        '{"response": "4", "answer": "4", "verifier": "exact", "label": "yes"}',
        '{"response": "4", "answer": "4", "verifier": "exact", "metadata": [1]}',
        "",
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "labelled.jsonl"
    path.write_text(line)
    with pytest.raises(DataError, match=r"labelled\.jsonl"):
        read_cases(path)


@pytest.mark.parametrize("label", ["1" + "0" * 400, "1e999", "NaN", "1" + "0" * 5000])
def test_labels_that_no_number_holds_are_named(tmp_path: Path, label: str) -> None:
    path = tmp_path / "labelled.jsonl"
    path.write_text(f'{{"response": "4", "answer": "4", "verifier": "exact", "label": {label}}}')
    with pytest.raises(DataError, match=r"labelled\.jsonl, line 1"):
        read_cases(path)


@pytest.mark.parametrize("unit", [" ", "\n", "</s>", "<eos>", "<|x|>", "<|", "<|x ", "\u2003"])
def test_ends_of_responses_are_found_in_linear_time(unit: str) -> None:
    """Searched from the start, each run of blanks is tried from each of its characters."""
    begin = time.process_time()
    assert _without_ends(unit * 40_000 + "x") == unit * 40_000 + "x"
    assert _without_ends("x" + unit * 40_000) == (
        "x" if unit not in ("<|", "<|x ") else ("x" + unit * 40_000).rstrip()
    )
    assert time.process_time() - begin < 2


def test_ends_of_responses() -> None:
    assert _without_ends("4 </s> <|im_end|>\n<eos>") == "4"
    assert _without_ends("4<|end_of_thought|>") == "4<|end_of_thought|>"
    assert _without_ends(" </s>") == _without_ends("") == ""


def test_times_of_few_cases() -> None:
    case = Case(name="", prompt="", response="", answer="", verifier="exact")
    assert Audit([]).milliseconds(99) == 0.0
    assert Audit([Verdict(case=case, reward=0.0, failed=False, seconds=0.25)]).milliseconds(50) == 250.0


def test_the_tool(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "audit_rewards.py")]
    found = subprocess.run([*command, str(jsonl(tmp_path, LINES)), "--json"], capture_output=True, text=True)
    assert found.returncode == 1, found.stderr
    assert len(json.loads(found.stdout)["disagreements"]) == 2
    few = subprocess.run(
        [*command, str(jsonl(tmp_path, LINES)), "--limit", "4"], capture_output=True, text=True
    )
    assert "2 of 6 responses are left out:\n  2, beyond the limit of 4 (line 5; line 6)" in few.stdout
    for option in ("--limit=-1", "--limit=0", "--timeout=nan", "--timeout=inf", "--timeout=-1"):
        bad = subprocess.run([*command, str(tmp_path), option], capture_output=True, text=True)
        assert bad.returncode == 2 and option.split("=")[0] in bad.stderr and "Traceback" not in bad.stderr
    refused = subprocess.run([*command, str(tmp_path / "none.jsonl")], capture_output=True, text=True)
    assert refused.returncode == 2 and "none.jsonl" in refused.stderr


def test_a_run_with_terms_is_graded_as_it_was(tmp_path: Path) -> None:
    """Training responses by all terms of their branch, evaluations by the sample's verifier alone."""
    (tmp_path / "config.yaml").write_text(
        "model: {path: base}\n"
        "branches:\n"
        "  text: {data: {train: [t.tar]}, reward: {verifiers: [numeric, format], "
        "terms: {sample: 0.5, format: 0.25}}}\n"
        "  more: {data: {train: [t.tar]}}\n"
    )
    thought = {"response": "<think>hm</think>Answer: 4<|im_end|>", "prompt": "2 + 2?", "lengths": [36]}
    train = [sample(reward=0.75, **thought), sample(reward=0.25, gold="5", **thought)]
    write_samples(tmp_path / FOLDER / "text", "train", 3, train)
    told = sample(kind=Kind.validation, model="text", reward=1.0, **thought)
    write_samples(tmp_path / FOLDER / "text", "text", 3, [told])
    write_samples(tmp_path / FOLDER / "more", "train", 3, [sample(model="more", reward=1.0, **thought)])
    result = audit(read_cases(tmp_path).cases)
    assert [one.reward for one in result.verdicts] == [1.0, 1.0, 0.75, 0.25], [
        o.case for o in result.verdicts
    ]
    assert not result.disagreements
    (alone,) = {one.case.verifier for one in audit(read_cases(tmp_path, verifier="exact").cases).verdicts}
    assert alone == "exact"
