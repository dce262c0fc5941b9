"""The report of a run: its history read back, behaviour lines, and a picture that shows the data."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from copd_megatron.cli.main import main
from copd_megatron.evaluation.table import save_table
from copd_megatron.report.curves import behaviour_lines, read_run, save_plots, sparkline, write_report


def write_run(folder: Path, num_steps: int = 20, **extra: list[float]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for step in range(1, num_steps + 1):
        phase = "opd" if step > num_steps // 2 else "rlvr"
        row: dict[str, Any] = {"step": step, "phase": phase, "text/train/reward": step / num_steps}
        row["copd/overlap@10/text-image"] = 1.0 - 0.01 * step
        row["copd/sym_kl/text-image"] = 0.001 * step
        if phase == "opd":
            row["copd/teacher_gap/text<-image"] = -0.1
        row |= {name: values[step - 1] for name, values in extra.items()}
        lines.append(json.dumps(row))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_a_run_is_read_back(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    save_table(folder, {"base": {"text": 0.25}, "merged": {"text": 0.75}}, ["text"])
    history = read_run(folder)
    assert history.name == "run" and history.steps == tuple(range(1, 21))
    assert history.phases[9:11] == ("rlvr", "opd")
    assert history.named("", "/train/reward") == {"text": history.series["text/train/reward"]}
    gap = history.series["copd/teacher_gap/text<-image"]
    assert all(map(math.isnan, gap[:10])) and set(gap[10:]) == {-0.1}
    assert history.accuracy["merged"]["text"] == 0.75 and history.domains == ("text",)


def test_a_step_that_was_run_again_counts_once_as_written_last(tmp_path: Path) -> None:
    folder = write_run(tmp_path, 3)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 3, "phase": "opd", "text/train/reward": 0.5}) + "\n")
    history = read_run(folder)
    assert history.steps == (1, 2, 3) and history.series["text/train/reward"][2] == 0.5
    assert math.isnan(history.series["copd/sym_kl/text-image"][2])


def test_behaviour_lines_show_where_it_began_and_ended(tmp_path: Path) -> None:
    header, rule, overlap, kl = behaviour_lines(read_run(write_run(tmp_path))).splitlines()
    assert header.split()[:2] == ["student-teacher", "measure"] and set(rule) == {"-", " "}
    # a tenth of twenty measurements are two: (0.99 + 0.98) / 2 and (0.81 + 0.80) / 2
    assert overlap.split()[:4] == ["text-image", "overlap@10", "0.985", "0.805"]
    assert kl.split()[:5] == ["text-image", "symmetric", "KL", "0.002", "0.019"]
    assert overlap.split()[-1] == sparkline([-x for x in range(20)])
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "phase": "rlvr", "x": 1.0}) + "\n")
    assert behaviour_lines(read_run(tmp_path)) == ""


def test_sparklines_span_their_values() -> None:
    assert sparkline([]) == "" and sparkline([3.0, 3.0]) == "▁▁"
    assert sparkline([0.0, 7.0, 3.5]) == "▁█▅"
    assert len(sparkline([float(x) for x in range(1000)])) == 40


def test_the_picture_shows_the_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    before = np.asarray(Image.open(save_plots(read_run(folder), tmp_path / "a.png")).convert("RGB"))
    again = np.asarray(Image.open(save_plots(read_run(folder), tmp_path / "b.png")).convert("RGB"))
    assert np.array_equal(before, again)
    save_table(folder, {"base": {"text": 0.25}}, ["text"])
    after = np.asarray(Image.open(save_plots(read_run(folder), tmp_path / "c.png")).convert("RGB"))
    # the bar of the base, in the first colour, stands in the lower left
    bar = [(image[450:, :430] == (31, 119, 180)).all(-1).sum() for image in (before, after)]
    assert bar[0] == 0 and bar[1] > 1000


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run")
    save_table(folder, {"base": {"text": 0.25}}, ["text"])
    assert main(["report", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "25.0" in shown and "overlap@10" in shown and str(folder / "report.png") in shown
    assert (folder / "report.png").stat().st_size > 10_000
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "metrics.jsonl: no such file" in capsys.readouterr().err
    (folder / "metrics.jsonl").write_text("{}\n")
    assert main(["report", str(folder)]) == 2
    assert "line 1: not the metrics of a step" in capsys.readouterr().err


def test_a_run_of_one_step_without_behaviour_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "phase": "rlvr", "x/train/reward": 0.5}))
    text, picture = write_report(tmp_path)
    assert text == "" and picture.is_file()
