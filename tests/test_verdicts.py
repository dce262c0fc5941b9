"""Verdicts kept by prompt, their summary by domain, verifier and metadata, and the tables that show it."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from copd_megatron.errors import DataError
from copd_megatron.evaluation.show import to_json, to_markdown, to_text
from copd_megatron.evaluation.summary import POOLED, figures_of, summarise
from copd_megatron.evaluation.table import Accuracies, render_table
from copd_megatron.evaluation.verdicts import PromptVerdicts, VerdictFile, verdicts_of
from tests.support.rollouts import rollout


def verdicts(
    number: int,
    rewards: list[float | None],
    domain: str = "text",
    answers: list[str] | None = None,
    **meta: Any,
) -> PromptVerdicts:
    return PromptVerdicts(
        domain=domain,
        prompt=f"s-000000/{number}",
        verifier="math",
        metadata=meta,
        rewards=rewards,
        answers=answers or ["x"] * len(rewards),
        truncated=[False] * len(rewards),
        num_tokens=[10] * len(rewards),
    )


# --- the file ----------------------------------------------------------------------------------------------


def test_verdicts_of_responses() -> None:
    responses = [
        dataclasses.replace(rollout(r"so \boxed{4}", metadata={"level": 2}), reward=1.0),
        dataclasses.replace(rollout("5", truncated=True), reward=None),
    ]
    found = verdicts_of(responses[0].prompt, responses)
    assert (found.prompt, found.answers, found.rewards) == ("shard-000000/k", ["4", "5"], [1.0, None])
    assert found.truncated == [False, True] and found.num_tokens == [1, 1] and found.graded == [1.0]
    assert found.metadata == {"level": 2}


def test_a_file_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    file = VerdictFile(tmp_path, "merged", {"seed": 1})
    assert file.read() == []
    file.begin(anew=False)
    file.append([verdicts(1, [1.0]), verdicts(2, [0.0, None], level=3)])
    with (file.folder / "verdicts.jsonl").open("a") as stream:
        stream.write('{"domain": "te')
    file.close()
    again = VerdictFile(tmp_path, "merged", {"seed": 1})
    assert [v.prompt for v in again.read()] == ["s-000000/1", "s-000000/2"]
    again.begin(anew=False)
    again.append([verdicts(3, [1.0])])
    assert again.read() == [verdicts(1, [1.0]), verdicts(2, [0.0, None], level=3), verdicts(3, [1.0])]
    again.begin(anew=True)
    assert again.read() == []
    (again.folder / "verdicts.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="not verdicts"):
        again.read()


def test_two_writers_never_share_a_file(tmp_path: Path) -> None:
    """Each would append what the other has measured already, or forget it."""
    first, second = (VerdictFile(tmp_path, "merged", {"seed": 1}) for _ in range(2))
    first.begin(anew=False)
    first.append([verdicts(1, [1.0])])
    for anew in (False, True):
        with pytest.raises(DataError, match=r"merged-\w+: another copd eval writes it.*--out"):
            second.begin(anew=anew)
    assert second.read() == [verdicts(1, [1.0])], "reading goes on, and nothing is forgotten"
    first.close()
    second.begin(anew=False)
    second.close()


EVIL = "5\n\nmerged   99.9 [99.0, 100.0]\n| base | 100.0 |\t\x1b[2J<img src=x onerror=alert(1)>[a](http://b)`"


def test_names_forge_no_rows() -> None:
    """Metadata, models and domains come from files of others: each stays in its cell."""
    rows = [
        dataclasses.replace(verdicts(n, [float(n % 2)], level=EVIL if n < 3 else "1"), domain=EVIL)
        for n in range(8)
    ]
    summary = summarise({EVIL: rows, "b" * 5000: rows}, by=("level",))
    score: Accuracies = {EVIL: {EVIL: 0.5}, "b": {EVIL: 1.0}}
    texts = [to_text(summary), render_table(score, [EVIL])]
    pages = [to_markdown(summary), render_table(score, [EVIL], style="markdown")]
    for text in [*texts, *pages]:
        lines = text.split("\n")
        assert not any(line.startswith(("merged", "| base", "5")) and "\\n" not in line for line in lines)
        assert "\x1b" not in text and "\t" not in text and max(map(len, lines)) < 2000
    for page in pages:
        assert "<img" not in page and "](" not in page
        tables = [block.split("\n") for block in page.split("\n\n") if block.startswith("|")]
        assert tables and all(len({line.count("|") for line in table}) == 1 for table in tables)


def test_other_settings_have_another_file(tmp_path: Path) -> None:
    first = VerdictFile(tmp_path, "merged", {"seed": 1, "model": "a"})
    first.begin(anew=False)
    first.append([verdicts(1, [1.0])])
    assert VerdictFile(tmp_path, "merged", {"seed": 1, "model": "b"}).read() == []
    assert VerdictFile(tmp_path, "merged", {"model": "a", "seed": 1}).read() == [verdicts(1, [1.0])]
    assert json.loads((first.folder / "settings.json").read_text()) == {"seed": 1, "model": "a"}


# --- the summary -------------------------------------------------------------------------------------------


def test_figures_of_several_responses() -> None:
    found = figures_of(
        [
            verdicts(1, [1.0, 0.0, 0.5, 1.0], answers=["4", "5", "6", "4"]),
            verdicts(2, [0.0, 0.0, 0.0, None], answers=["1", "1", "2", ""]),
        ]
    )
    assert (found.num_prompts, found.num_responses, found.num_ungraded) == (2, 8, 1)
    assert found.accuracy.value == 0.25, "2 of 4 and 0 of 3, averaged over prompts"
    assert found.mean_reward.value == pytest.approx((2.5 / 4 + 0) / 2)
    assert {k: e.value for k, e in found.pass_at.items()} == {
        1: 0.25,
        2: pytest.approx((1 - 1 / 6) / 2),
        4: 1.0,  # the second prompt has three graded responses
    }
    assert found.majority_at[4].value == 1.0
    assert found.mean_tokens == 10 and found.truncated == 0.0


def test_one_response_each_has_wilsons_interval() -> None:
    found = figures_of([verdicts(i, [float(i < 81)]) for i in range(263)])
    assert (round(found.accuracy.low, 4), round(found.accuracy.high, 4)) == (0.2553, 0.3662)
    assert list(found.pass_at) == [1] and not found.majority_at


def test_models_are_compared_on_the_same_prompts() -> None:
    base = [verdicts(i, [float(i % 3 == 0)], "text", level=i % 2) for i in range(60)]
    base += [verdicts(i, [0.0], "image") for i in range(20)]
    merged = [verdicts(i, [1.0], "text", level=i % 2) for i in range(60)]
    merged += [verdicts(i, [0.5], "image") for i in range(20)]
    summary = summarise({"base": base, "merged": merged}, by=["level", "verifier"])
    assert summary.domains == ["text", "image"]
    assert summary.means["merged"].value == 0.5 and summary.means["base"].value == pytest.approx(1 / 6)
    text, image, pooled = summary.differences
    assert (text.accuracy.value, text.num_prompts) == (pytest.approx(2 / 3), 60)
    assert text.accuracy.excludes_zero and not image.accuracy.excludes_zero
    assert image.mean_reward.value == 0.5 and pooled.group == POOLED and pooled.num_prompts == 80
    assert set(summary.by["level"]["base"]) == {"0", "1"}
    assert summary.by["level"]["base"]["0"].num_prompts == 30
    assert set(summary.by["verifier"]["merged"]) == {"math"}
    shown = to_text(summary)
    assert "merged - base" in shown and "+66.7" in shown and "mean reward" in shown
    assert "accuracy (%) by level" in shown and "33.3 [22.7, 45.9]" in shown
    assert to_markdown(summary).count("\n| --- |") == shown.count("\n---")
    record = json.loads(to_json(summary))
    assert record["models"]["merged"]["image"]["mean_reward"]["value"] == 0.5
    assert record["differences"][0]["accuracy"]["low"] > 0.5


def test_a_model_without_verdicts_of_a_domain_has_no_mean() -> None:
    summary = summarise({"a": [verdicts(1, [1.0]), verdicts(1, [None], "image")], "b": [verdicts(1, [0.0])]})
    assert math.isnan(summary.means["a"].value) and math.isnan(summary.means["b"].value)
    assert json.loads(to_json(summary))["means"]["a"]["value"] is None
    assert "-" in to_text(summary).splitlines()[4].split()
