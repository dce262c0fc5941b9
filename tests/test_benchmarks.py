"""Benchmarks from files in their published layouts: whole, or refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from copd_megatron.cli.main import main
from copd_megatron.data import DataError, Sample, check_shards
from copd_megatron.data.convert.benchmarks.table import BENCHMARKS
from copd_megatron.data.convert.benchmarks.write import _check_whole, convert_benchmark
from copd_megatron.data.convert.write import NewSample

LAYOUTS: dict[str, dict[str, Any]] = {
    "aime24": {"id": 60, "problem": "P", "solution": "S", "answer": "204", "url": "u", "year": "2024"},
    "aime25": {"problem": "P", "answer": "70", "id": "0"},
    "hmmt25": {"problem_idx": 1, "problem": "P", "answer": "\\frac{1}{576}", "problem_type": ["Algebra"]},
    "math500": {
        **{"problem": "P", "solution": "S", "answer": "\\left( 3, \\frac{\\pi}{2} \\right)", "level": 2},
        **{"subject": "Precalculus", "unique_id": "test/precalculus/807.json"},
    },
    "minerva": {"question": "P", "answer": "4.49e33"},
}

KEPT = {
    **{"aime24": ["id"], "aime25": ["id"], "hmmt25": ["problem_idx", "problem_type"]},
    "math500": ["subject", "level", "unique_id"],
}


def rows(name: str, count: int | None = None) -> list[dict[str, Any]]:
    number = BENCHMARKS[name].count if count is None else count
    field = "question" if name == "minerva" else "problem"
    return [{**LAYOUTS[name], field: f"Problem {i}?"} for i in range(number)]


def written(path: Path, found: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def samples(paths: list[Path]) -> list[Sample]:
    shards = check_shards([str(path) for path in paths])
    return [shards.read(ref) for ref in shards.refs]


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_no_benchmark_passes_that_is_half_of_it_twice(name: str) -> None:
    benchmark = BENCHMARKS[name]
    halves = [
        NewSample(
            prompt=f"Question {i}?",
            answer="1",
            verifier="math",
            metadata=dict.fromkeys((*benchmark.identity, *benchmark.parts), f"{i}"),
            media={"mp4": b"digest"},
        )
        for i in range((benchmark.count + 1) // 2)
    ]
    with pytest.raises(DataError, match="occur"):
        _check_whole(name, benchmark, [*halves, *halves][: benchmark.count], [Path("half.json")] * 2)


def test_one_question_about_two_videos_is_two() -> None:
    benchmark = dataclasses.replace(BENCHMARKS["video_holmes"], count=2)
    one = NewSample(prompt="Who?", answer="A", verifier="choice", metadata={}, media={"mp4": b"1"})
    other = dataclasses.replace(one, media={"mp4": b"2"})
    _check_whole("video_holmes", benchmark, [one, other], [Path("a.json")])
    with pytest.raises(DataError, match=r"1 questions of video_holmes occur before, 'Who\?' occurs 2 times"):
        _check_whole("video_holmes", benchmark, [one, one], [Path("a.json")])


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_a_whole_benchmark_becomes_a_validation_set(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        BENCHMARKS, name, dataclasses.replace(BENCHMARKS[name], count=3)
    )  # grading takes time
    found = samples(convert_benchmark(name, [written(tmp_path / "a.jsonl", rows(name))], tmp_path / "out"))
    assert len(found) == BENCHMARKS[name].count
    assert found[0].prompt == "Problem 0?\nPut your final answer in \\boxed{}."
    assert (found[0].answer, found[0].verifier) == (LAYOUTS[name]["answer"], "math")
    kept = {k: LAYOUTS[name][k] for k in KEPT.get(name, ())}
    assert found[0].metadata == {"benchmark": name, **kept}


def test_every_benchmark_has_its_published_number_of_problems() -> None:
    counts = {name: benchmark.count for name, benchmark in BENCHMARKS.items()}
    assert counts == {
        **{"aime24": 30, "aime25": 30, "hmmt25": 30, "math500": 500, "minerva": 272},
        **{"mmmu": 900, "mmmu_pro": 1730, "mmmu_pro_vision": 1730, "mathvista": 1000},
        **{"mathvision": 3040, "mathvision_mini": 304, "mathverse": 3940, "wemath": 1740},
        **{"zerobench": 100, "zerobench_sub": 334},
        **{"video_holmes": 1837, "mvbench": 4000, "mmvu": 1000, "videomathqa": 420},
    }


def test_two_files_and_parquet(tmp_path: Path) -> None:
    one = written(tmp_path / "I.jsonl", [{"question": f"{i}?", "answer": i} for i in range(15)])
    two = tmp_path / "II.parquet"
    parquet.write_table(
        arrow.Table.from_pylist([{"question": f"II {i}?", "answer": str(i)} for i in range(15)]), two
    )
    found = samples(convert_benchmark("aime25", [one, two], tmp_path / "out"))
    assert [sample.answer for sample in found] == [str(i) for i in range(15)] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found[:-1], "29 questions; aime24 has 30"),
        (lambda found: [*found, found[0]], "31 questions; aime24 has 30"),
        (lambda found: [{"text": "?"}, *found[1:]], r"line 1: needs text in 'problem' or 'Problem'"),
        (lambda found: [*found[:-1], {**found[0], "answer": ""}], "line 30: needs text in 'answer'"),
    ],
)
def test_what_is_not_the_benchmark_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    source = written(tmp_path / "a.jsonl", change(rows("aime24")))
    with pytest.raises(DataError, match=message):
        convert_benchmark("aime24", [source], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = written(tmp_path / "a.jsonl", rows("hmmt25"))
    assert main(["data", "benchmark", "hmmt25", str(source), "--out", str(tmp_path)]) == 0
    assert "30 questions in 1 shard(s)" in capsys.readouterr().out
    assert main(["data", "benchmark", "hmmt25", str(source), "--out", str(tmp_path)]) == 2
    assert main(["data", "benchmark", "nothing", str(source), "--out", str(tmp_path)]) == 2
