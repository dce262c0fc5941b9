"""The report of a run: its history read back, behaviour lines, and a picture that shows the data."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from copd_megatron.cli.main import main
from copd_megatron.evaluation.table import save_table
from copd_megatron.report.behaviour import behaviour_lines, sparkline
from copd_megatron.report.curves import save_plots, write_report
from copd_megatron.report.history import RunHistory, read_run
from copd_megatron.report.panels import panels as all_panels


def write_run(folder: Path, num_steps: int = 20, extra: Mapping[str, Sequence[float]] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for step in range(1, num_steps + 1):
        phase = "opd" if step > num_steps // 2 else "rlvr"
        row: dict[str, Any] = {"step": step, "phase": phase, "text/train/reward": step / num_steps}
        row["image/timing/step_seconds"] = 1.0
        row["copd/overlap@10/text-image"] = 1.0 - 0.01 * step
        row["copd/sym_kl/text-image"] = 0.001 * step
        if phase == "opd":
            row["copd/teacher_gap/text<-image"] = -0.1
        row |= {name: values[step - 1] for name, values in (extra or {}).items()}
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


def test_steps_ahead_are_shown_where_a_run_lets_branches_be_ahead(tmp_path: Path) -> None:
    plain = read_run(write_run(tmp_path / "plain", 4))
    lagging = write_run(tmp_path / "lag", 4, {"text/perf/steps_ahead": [0.0, 1.0, 1.0, 0.0]})
    title = "steps ahead of the slowest branch"
    assert title not in [panel.title for panel in all_panels([plain])]
    (panel,) = (panel for panel in all_panels([read_run(lagging)]) if panel.title == title)
    assert [(curve.label, curve.values) for curve in panel.curves] == [("text", (0.0, 1.0, 1.0, 0.0))]


def test_a_step_that_was_run_again_counts_once_as_written_last(tmp_path: Path) -> None:
    folder = write_run(tmp_path, 3)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 3, "phase": "opd", "text/train/reward": 0.5}) + "\n")
    history = read_run(folder)
    assert history.steps == (1, 2, 3) and history.series["text/train/reward"][2] == 0.5
    assert math.isnan(history.series["copd/sym_kl/text-image"][2])


def test_an_incomplete_last_line_is_not_a_step(tmp_path: Path) -> None:
    folder = write_run(tmp_path, 3)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "pha')
    assert read_run(folder).steps == (1, 2, 3)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match="line 4: not the metrics of a step"):
        read_run(folder)


def test_edges_are_named_alike_whatever_their_metric() -> None:
    names = ("a/train/reward", "a-b/train/reward", "b/train/reward", "b-c/train/reward", "copd/sym_kl/a-b")
    history = RunHistory(name="run", steps=(1,), phases=("rlvr",), series=dict.fromkeys(names, (0.5,)))
    assert history.edge("a-b") == "a<-b" and history.edge("b-a-b") == "b<-a-b"
    assert history.edge("a-b-b-c") == "a-b<-b-c"
    assert history.edge("a-unknown") == "a-unknown"


def test_behaviour_lines_show_where_it_began_and_ended(tmp_path: Path) -> None:
    header, rule, overlap, kl = behaviour_lines(read_run(write_run(tmp_path))).splitlines()
    assert header.split()[:2] == ["student<-teacher", "measure"] and set(rule) == {"-", " "}
    # a tenth of twenty measurements are two: (0.99 + 0.98) / 2 and (0.81 + 0.80) / 2
    assert overlap.split()[:4] == ["text<-image", "overlap@10", "0.985", "0.805"]
    assert kl.split()[:5] == ["text<-image", "symmetric", "KL", "0.002", "0.019"]
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
    # the bar of the base, in grey, stands in the lower left
    bar = [(image[450:, :430] == (166, 166, 166)).all(-1).sum() for image in (before, after)]
    assert bar[0] < 100 and bar[1] > 1000  # edges of letters are grey too


def panels(history: RunHistory, path: Path) -> list[Any]:
    """The axes of the picture, as matplotlib drew them."""
    from unittest.mock import patch

    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    save = Figure.savefig

    def note(figure: Figure, *arguments: Any, **options: Any) -> None:
        drawn.append(figure)
        save(figure, *arguments, **options)

    with patch.object(Figure, "savefig", note):
        save_plots(history, path)
    (figure,) = drawn
    return list(figure.axes)


def test_axes_do_not_mislead(tmp_path: Path) -> None:
    """Whole steps, per cent up to 100 with the values on the bars, and an overlap of 0.92 near the top."""
    overlap = [0.98 - 0.003 * step for step in range(20)]
    folder = write_run(
        tmp_path / "run", extra={"copd/overlap@10/text-image": overlap, "image/train/reward": overlap}
    )
    save_table(
        folder, {"base": {"text": 0.25, "image": math.nan}, "merged": {"text": 0.875}}, ["text", "image"]
    )
    reward, similar, _, bars, *_ = panels(read_run(folder), tmp_path / "a.png")
    assert reward.get_ylim() == pytest.approx((-0.02, 1.02))
    assert all(tick == int(tick) for tick in similar.get_xticks())
    low, high = similar.get_ylim()
    assert low == 0.5 and high >= 1.0
    assert bars.get_ylim() == (0, 100)
    assert [text.get_text() for text in bars.texts] == ["25.0", "87.5"]
    legend = similar.get_legend().get_window_extent()
    assert legend.y1 < similar.get_window_extent().y0, "below the axes"
    assert [text.get_text() for text in similar.get_legend().get_texts()] == ["text<-image"]


def test_an_overlap_that_falls_far_shows_its_whole_fall(tmp_path: Path) -> None:
    folder = write_run(
        tmp_path / "run", extra={"copd/overlap@10/text-image": [1.0 - 0.04 * s for s in range(20)]}
    )
    assert panels(read_run(folder), tmp_path / "a.png")[1].get_ylim()[0] == 0.0


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
