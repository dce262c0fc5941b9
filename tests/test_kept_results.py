"""Results of the comparison that were measured on another machine: kept, and read as they were written."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from copd_megatron.evaluation.statistics import Estimate
from copd_megatron.reproduction.kept import read_results, with_kept, write_results
from copd_megatron.reproduction.setting import CHOSEN, SETTINGS


def some_results(setting: str, **comparisons: float) -> dict[str, Any]:
    return {
        "setting": dataclasses.asdict(SETTINGS[setting]),
        "selection": {setting: {}},
        "criteria": [],
        "comparisons": {name: {"core_seconds": spent} for name, spent in comparisons.items()},
    }


def test_a_page_keeps_the_comparisons_that_were_run_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    assert read_results(path) == {}
    write_results(path, some_results(CHOSEN, two=1.0, three=2.0))
    found = with_kept(some_results(CHOSEN, three=3.0, four=4.0), read_results(path))
    assert found["comparisons"] == {
        name: {"core_seconds": s} for name, s in zip(("two", "three", "four"), (1, 3, 4), strict=True)
    }
    other = with_kept(some_results("tables_34", four=4.0), read_results(path))
    assert list(other["comparisons"]) == ["four"]
    assert set(other["selection"]) == {CHOSEN, "tables_34"}


def test_a_setting_that_is_new_and_not_named_in_the_results_does_not_drop_them(tmp_path: Path) -> None:
    before = some_results(CHOSEN, two=1.0)
    del before["setting"]["num_pictures"]
    path = tmp_path / "results.json"
    write_results(path, before)
    assert "two" in with_kept(some_results(CHOSEN), read_results(path))["comparisons"]


def test_intervals_without_ends_are_the_same_after_writing_and_reading(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    figures = [dataclasses.asdict(Estimate(value=0.5, low=-math.inf, high=math.inf)), {"against": None}]
    write_results(path, {"figures": figures})
    assert "Infinity" not in path.read_text()
    assert read_results(path) == {"figures": figures}
