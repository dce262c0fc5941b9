"""The paper's table beside the user's figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from copd_megatron.cli.eval import write_tables
from copd_megatron.data.convert.benchmarks.table import BENCHMARKS
from copd_megatron.errors import ConfigError
from copd_megatron.evaluation.paper import AVERAGE, Paper, paper_tables, published, read_paper
from copd_megatron.evaluation.verdicts import PromptVerdicts

SMALL = Paper(
    columns={"text": ["aime24", "aime25"], "video": ["mmvu"]},
    rows={"CoPD": {"text": {"aime24": 50.0, AVERAGE: 45.5}}, "MOPD": {"video": {"mmvu": 40.0}}},
)


def test_every_column_is_a_benchmark_that_can_be_read() -> None:
    assert published().benchmarks <= BENCHMARKS.keys()


def test_published_figures_stand_above_the_users() -> None:
    (table,) = paper_tables(SMALL, {"mine": {"aime24": 0.5, "aime25": 0.25}, "other": {"aime24": 1.0}})
    assert table.header == ["model", "aime24", "aime25", "average"]
    assert table.rows == [
        ["CoPD (paper)", "50.00", "-", "45.50"],
        ["mine", "50.00", "25.00", "37.50"],
        ["other", "100.00", "-", "-"],
    ]


def test_groups_that_nobody_answered_are_left_out() -> None:
    assert paper_tables(SMALL, {"mine": {"something else": 0.5}}) == []
    (table,) = paper_tables(SMALL, {"mine": {"mmvu": 0.5}})
    assert [row[0] for row in table.rows] == ["MOPD (paper)", "mine"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{text: {aime26: 3}}", r"rows\.X\.text\.aime26: not a column of the table \(aime24, average\)"),
        ("{sound: {aime24: 3}}", "no group of that name"),
        ("{text: {aime24: 130}}", "130 is not a percentage"),
    ],
)
def test_what_the_table_does_not_have_is_refused(row: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_paper(f"columns: {{text: [aime24]}}\nrows: {{X: {row}}}")


def test_the_command_shows_it_where_prompts_are_of_its_benchmarks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def verdict(prompt: int, **metadata: str) -> PromptVerdicts:
        return PromptVerdicts(
            domain="clips",
            prompt=str(prompt),
            verifier="choice",
            metadata=metadata,
            rewards=[float(prompt % 2)],
            answers=["A"],
            truncated=[False],
            num_tokens=[3],
        )

    write_tables({"mine": [verdict(i, benchmark="mmvu") for i in range(4)]}, tmp_path, ())
    out = capsys.readouterr().out
    assert "video benchmarks, accuracy (%)" in out and "CoPD (paper)" in out and "59.21" in out
    line = next(row for row in out.splitlines() if row.startswith("mine") and row.count("-") == 4)
    assert line.split() == ["mine", "-", "-", "50.00", "-", "-"]
    assert "**video benchmarks" in (tmp_path / "evaluation.md").read_text()
    write_tables({"mine": [verdict(i) for i in range(4)]}, tmp_path, ())
    assert "(paper)" not in capsys.readouterr().out
