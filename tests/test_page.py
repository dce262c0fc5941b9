"""The report's page: what its figures and tables show, that it escapes what models say, and that a browser
shows it without asking anybody for anything."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from copd_megatron.cli.main import main
from copd_megatron.config import BranchConfig, Config, DataConfig, load_config
from copd_megatron.data.convert.write import NewSample, write_shards
from copd_megatron.data.media import MediaPlace, content_hash
from copd_megatron.evaluation.table import save_table
from copd_megatron.launch.provenance import record_start
from copd_megatron.report.drawing import draw_panel
from copd_megatron.report.history import MAX_SHOWN, read_run
from copd_megatron.report.merge_distance import DistanceReport, LayerDistance, read_distances
from copd_megatron.report.page import PageOptions, shade_of, shown_sample, write_page
from copd_megatron.report.panels import Curve, Panel, PhaseSpan, panels, phase_spans, smoothed
from copd_megatron.report.scores import interval, score_table
from copd_megatron.report.thumbnails import Thumbnails
from copd_megatron.samples.files import write_samples
from copd_megatron.tiny.tasks.encode import mp4, png
from tests.test_report import write_run
from tests.test_samples import make

HOSTILE = "</div><script>fetch('http://example.org')</script><img src=http://example.org/x>"


def full_run(folder: Path, *, shift: float = 0.0) -> Path:
    """A run with everything that a page can show."""
    steps = range(1, 21)
    extra = {
        "text/timing/step_seconds": [2.0] * 20,
        "text/timing/generation_seconds": [0.5] * 20,
        "text/timing/update_seconds": [1.0 + 0.01 * s for s in steps],
        "text/timing/checkpoint_seconds": [0.0 if s != 10 else 0.25 for s in steps],
        "text/timing/grading_seconds": [0.0] * 20,
        "text/timing/other_seconds": [0.5 - 0.01 * s for s in steps],
        "text/validation/accuracy/text": [0.5 if s % 5 == 0 else math.nan for s in steps],
        "text/train/reward": [min(1.0, s / 20 + shift) for s in steps],
        "text/train/entropy": [1 / s for s in steps],
    }
    write_run(folder, extra=extra)
    text = (folder / "metrics.jsonl").read_text().replace("NaN", "null")
    (folder / "metrics.jsonl").write_text(text)
    rows: dict[str, Any] = {
        "base": {"text": 0.25 + shift, "image": 0.5},
        "text": {"text": 0.75, "image": 0.5},
        "merged": {"text": 0.875 + shift, "image": 0.75},
    }
    save_table(folder, rows, ["text", "image"], num_prompts={"text": 40, "image": 8})
    given = folder.with_suffix(".yaml")
    given.write_text("run: {name: x}\nmodel: {path: base}\n")
    record_start(load_config(given), folder, ["train", "my.yaml"])
    samples = [
        make(prompt=HOSTILE, response=HOSTILE, lengths=[len(HOSTILE)], gold="<b>3</b>"),
        make(reward=1.0, response="yes!", lengths=[3, 1], student=[-1.0, -2.0], teacher=[-0.1, -4.0]),
        dataclasses.replace(make(teacher=None, edge=None, metadata={"a": 1}), step=2),
    ]
    write_samples(folder / "samples/text", "train", 1, samples)
    return folder


# --- curves ------------------------------------------------------------------------------------------------


def test_which_panels_a_run_has(tmp_path: Path) -> None:
    run = read_run(full_run(tmp_path / "a"))
    found = {panel.title.split(",")[0].split(" (")[0]: panel for panel in panels([run])}
    assert {
        "reward on the branch's own prompts",
        "overlap@10",
        "symmetric KL",
        "entropy of the policy",
    } <= set(found)
    assert phase_spans(run) == [PhaseSpan(first=11, last=20)]
    (validation,) = found["validation accuracy during training"].curves
    assert validation.label == "text on text"
    assert validation.low is not None and round(validation.low[4], 3) == 0.352, "Wilson, 20 of 40"


def test_the_seconds_of_a_step_add_up(tmp_path: Path) -> None:
    run = read_run(full_run(tmp_path / "a"))
    panel = next(p for p in panels([run]) if p.title == "seconds of a step: text")
    shown = ["generation", "update", "checkpoint", "other"]
    assert panel.stacked and [c.label for c in panel.curves] == shown, "grading took nothing"
    total = [math.fsum(values) for values in zip(*(c.values for c in panel.curves), strict=True)]
    assert total == pytest.approx([2.25 if step == 10 else 2.0 for step in range(1, 21)])


def test_several_runs_are_a_mean_and_a_band(tmp_path: Path) -> None:
    runs = [read_run(full_run(tmp_path / str(i), shift=0.05 * i)) for i in range(3)]
    reward = next(c for c in panels(runs)[0].curves if c.label == "text")
    assert reward.values[0] == pytest.approx(0.1) and reward.low is not None and reward.high is not None
    assert (reward.low[0], reward.high[0]) == (pytest.approx(0.05), pytest.approx(0.15))


def test_a_branch_with_several_pools_has_a_curve_for_each(tmp_path: Path) -> None:
    without = read_run(full_run(tmp_path / "a"))
    assert "reward by pool" not in {panel.title for panel in panels([without])}
    pools = {f"text/train/reward/{pool}": [share] * 20 for pool, share in (("sums", 0.25), ("words", 0.75))}
    write_run(tmp_path / "b", extra={"text/train/reward": [0.5] * 20, **pools})
    found = {panel.title: panel for panel in panels([read_run(tmp_path / "b")])}
    curves = {curve.label: curve.values[0] for curve in found["reward by pool"].curves}
    assert curves == {"text: sums": 0.25, "text: words": 0.75}
    own = found["reward on the branch's own prompts"].curves
    assert next(curve.values[0] for curve in own if curve.label == "text") == 0.5


def test_an_axis_from_zero_shows_no_negative_share() -> None:
    curve = Curve(label="a", steps=(1, 2, 3), values=(0.0, 0.0, 0.0))
    shown = draw_panel(Panel(title="t", curves=[curve], from_zero=True), [], {})
    assert "\u2212" not in shown and ">0.05<" in shown.replace("\n", "")
    assert "\u2212" in draw_panel(Panel(title="t", curves=[curve]), [], {}), "left to itself, it would"


def test_a_long_legend_takes_no_height_from_the_axes() -> None:
    def height(count: int) -> float:
        curves = [Curve(label=f"running_sums on {i}", steps=(1, 2), values=(0.1, 0.2)) for i in range(count)]
        found = re.search(
            r'viewBox="0 0 [\d.]+ ([\d.]+)"', draw_panel(Panel(title="t", curves=curves), [], {})
        )
        assert found is not None
        return float(found.group(1))

    assert height(8) > height(2) + 20


def test_long_curves_are_smoothed_and_short_ones_are_not() -> None:
    assert smoothed([1.0, 5.0]) == (1.0, 5.0)
    noisy = [float(i % 2) for i in range(400)]
    assert all(0.3 < value < 0.7 for value in smoothed(noisy))


def test_a_drawing_takes_the_pages_colours() -> None:
    curve = Curve(label="<a>", steps=(1, 2, 9), values=(0.1, 0.2, 0.3))
    colors: dict[str, str] = {}
    panel = Panel(title="t", curves=[curve], reference=0.2)
    svg = draw_panel(panel, [PhaseSpan(first=2, last=2)], colors)
    assert svg.startswith("<svg") and "currentColor" in svg and "var(--grid)" in svg and "var(--shade)" in svg
    assert "&lt;a&gt;" in svg and 'viewBox="' in svg and not re.search(r'<svg[^>]* width="', svg)
    assert draw_panel(panel, [PhaseSpan(first=2, last=2)], colors) == svg
    assert colors == {"<a>": "#3b82c4"}


# --- scores ------------------------------------------------------------------------------------------------


def test_scores_of_one_run_have_best_and_worst(tmp_path: Path) -> None:
    table = score_table([read_run(full_run(tmp_path / "a"))])
    assert table is not None and table.models == ["base", "text", "merged"]
    assert (table.rank("merged", "text"), table.rank("base", "text")) == ("best", "worst")
    assert [table.rank(m, "image") for m in table.models] == ["worst", "worst", "best"]
    cell = table.cell("base", "text")
    assert cell is not None and (round(cell.low, 3), round(cell.high, 3)) == (0.142, 0.402)
    assert not table.differences


def test_scores_of_several_runs_have_students_intervals_and_gains(tmp_path: Path) -> None:
    table = score_table([read_run(full_run(tmp_path / str(i), shift=0.05 * i)) for i in range(3)])
    assert table is not None and table.num_runs == 3
    cell = table.cell("base", "text")
    assert cell is not None and cell.value == pytest.approx(0.3)
    assert cell.high - cell.value == pytest.approx(4.303 * 0.05 / math.sqrt(3), abs=1e-4)
    share = score_table([read_run(full_run(tmp_path / f"high{i}", shift=0.12 * i)) for i in range(2)])
    assert share is not None and share.cells["merged"]["text"].high == 1.0, "a share does not pass 100 %"
    gain = table.differences["merged"]["text"]
    assert (gain.value, gain.low, gain.high) == (pytest.approx(0.625),) * 3, "the same in every run"
    assert interval([0.5]).low == 0.5
    assert score_table([read_run(write_run(tmp_path / "new"))]) is None


# --- samples -----------------------------------------------------------------------------------------------


def test_tokens_are_shaded_by_the_teachers_log_ratio() -> None:
    assert [shade_of(r) for r in (None, 0.1, 0.5, 2.5, 99.0, -1.0)] == ["", "", "p1", "p5", "p5", "n2"]
    shown = shown_sample(make(response="abcd", lengths=[1, 1, 2], student=[-1, -1, -1], teacher=[-1, -1, -3]))
    assert [(t.text, t.shade, t.note) for t in shown.tokens] == [
        ("ab", "", ""),
        ("cd", "n4", "log-ratio -2.00"),
    ]
    assert shown.gap == pytest.approx(-2 / 3)


def test_a_page_fetches_nothing_that_a_run_names(tmp_path: Path) -> None:
    """The configuration comes with the run, and may be a stranger's."""
    touched = tmp_path / "touched"
    config = Config()
    sources = [f"pipe:touch {touched}; false", "http://127.0.0.1:9/x.tar"]
    config.branches["image"] = BranchConfig(data=DataConfig(train=sources, validation=sources))
    assert Thumbnails(config).uri(
        {"content_hash": "0", "kind": "image", "source": "image/train", "shard": "x", "key": "k",
         "extension": "png"}
    ) is None  # fmt: skip
    assert not touched.exists()


def test_thumbnails_come_from_the_runs_shards(tmp_path: Path) -> None:
    frames = [np.full((48, 200, 3), 50 * i, np.uint8) for i in range(5)]
    media = {"0.png": png(frames[4]), "mp4": mp4(frames, 4.0)}
    write_shards([NewSample(prompt="p", answer="a", verifier="exact", key="k", media=media)], tmp_path, "i")
    config = Config()
    config.branches["image"] = BranchConfig(data=DataConfig(train=[str(tmp_path / "i-*.tar"), "absent.tar"]))
    thumbnails = Thumbnails(config)

    def size(extension: str, **changed: str) -> tuple[int, int] | None:
        place = MediaPlace("image/train", "i-000000", "k", extension)
        uri = thumbnails.uri({**dataclasses.asdict(place.ref(content_hash(media[extension]))), **changed})
        if uri is None:
            return None
        return Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/jpeg;base64,")))).size

    assert size("0.png") == (128, 31), "at most 128 pixels a side"
    assert size("mp4") == (4 * 128, 31), "four frames in a row"
    assert size("0.png", content_hash="of another picture") is None
    assert size("0.png", content_hash="0", shard="elsewhere") is None


# --- the page ----------------------------------------------------------------------------------------------


class References(HTMLParser):
    """What a page refers to, and the elements that it has."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        names = ("src", "href", "xlink:href", "srcset", "data", "action", "poster")
        self.addresses += [value or "" for name, value in attrs if name in names]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = full_run(tmp_path_factory.mktemp("one") / "run")
    return write_page([folder], folder / "report.html")


def test_the_page_holds_everything_and_refers_to_nothing(one: Path) -> None:
    text = one.read_text()
    found = References()
    found.feed(text)
    assert all(address.startswith(("#", "data:")) for address in found.addresses), found.addresses
    assert not found.tags & {"script", "link", "iframe", "object", "embed", "form"}
    assert not re.search(r"url\((?!#)|@import", text)
    assert "default-src 'none'" in text
    for words in (
        "+43.8 points",
        "[14.2, 40.2]",
        "teacher gap",
        "seconds of a step",
        "megatron-core",
        "n=40",
    ):
        assert words in text
    assert HOSTILE not in text and "&lt;script&gt;" in text and "&lt;b&gt;3&lt;/b&gt;" in text
    assert len(text) < 600_000


def test_how_far_branches_moved_is_read_back_and_shown(tmp_path: Path) -> None:
    layer = LayerDistance(
        layer="all", num_elements=4, base_norm=2.0, moved=(0.5, math.nan), cosines=(math.nan,)
    )
    report = DistanceReport(base="base", branches=("text", "image"), layers=(layer,))
    folder = full_run(tmp_path / "run")
    (folder / "distances.json").write_text(report.to_json())
    assert read_distances(folder / "distances.json").rows() == report.rows()
    text = write_page([folder], folder / "report.html").read_text()
    assert "How far the branches moved" in text and "5.000e-01" in text
    (folder / "distances.json").write_text("{}")
    with pytest.raises(ValueError, match="no distances of branches"):
        write_page([folder], folder / "report.html")


def test_the_page_of_several_runs(tmp_path: Path) -> None:
    folders = [full_run(tmp_path / f"seed{i}", shift=0.05 * i) for i in range(3)]
    text = write_page(folders, tmp_path / "seeds.html", PageOptions(num_samples=0)).read_text()
    assert "Means of 3 runs" in text and "gain over the base" in text and "seed0 · seed1 · seed2" in text
    assert "What the models answered" not in text


def test_how_many_runs_and_prompts_a_figure_is_of(tmp_path: Path) -> None:
    """A mean over fewer runs than were named, or over other prompts, is said where it stands."""
    folders = [full_run(tmp_path / f"seed{i}", shift=0.05 * i) for i in range(3)]
    same = score_table([read_run(folder) for folder in folders])
    assert same is not None and same.prompts("text") == "n=40" and not same.prompts_differ
    assert same.note("merged", "text") == same.difference_note("merged", "text") == ""
    text = write_page(folders, tmp_path / "same.html", PageOptions(num_samples=0)).read_text()
    text = text[: text.index('id="settings"')]  # behind it stand the runs' own words
    assert "n=40<" in text and "different numbers" not in text and "3 of 3 runs" not in text

    rows = {"base": {"text": 0.5, "image": 0.5}, "text": {"text": 0.75, "image": math.nan}}
    save_table(folders[1], rows, ["text", "image"], num_prompts={"text": 20, "image": 8})
    (folders[2] / "evaluation.json").unlink()
    short = (folders[2] / "metrics.jsonl").read_text().splitlines()[:15]
    (folders[2] / "metrics.jsonl").write_text("".join(line + "\n" for line in short))
    runs = [read_run(folder) for folder in folders]
    table = score_table(runs)
    assert table is not None and table.num_runs == 2
    assert (table.note("base", "text"), table.note("merged", "text")) == ("", "1 of 2 runs")
    assert (table.prompts("text"), table.prompts("image")) == ("n=20 to 40", "n=8")
    assert table.prompts_differ == ["text"]
    text = write_page(folders, tmp_path / "other.html", PageOptions(num_samples=0)).read_text()
    assert "n=20 to 40" in text and "1 of 2 runs" in text
    assert "Without a table, and so not counted: seed2." in text
    assert "Runs have different numbers of prompts (text)" in text
    assert "different numbers of steps, from 15 to 20" in text
    assert "means of 1 and 2 runs, not of the same" in text
    reward = next(panel for panel in panels(runs) if panel.title.startswith("reward on"))
    assert reward.coverage == "text: 15 to 20 points a run."
    (folders[0] / "metrics.jsonl").write_text((write_run(tmp_path / "bare") / "metrics.jsonl").read_text())
    entropy = next(p for p in panels([read_run(f) for f in folders]) if p.title.startswith("entropy"))
    assert entropy.coverage == "text: 2 of 3 runs; text: 15 to 20 points a run."


def test_one_measured_run_among_several_has_the_interval_of_its_prompts(tmp_path: Path) -> None:
    """One value has no spread between runs, and is not known exactly."""
    one, begun = full_run(tmp_path / "a"), write_run(tmp_path / "b")
    alone, among = (score_table([read_run(f) for f in folders]) for folders in ([one], [one, begun]))
    assert alone is not None and among is not None
    assert among.cells == alone.cells and among.num_runs == 1
    assert among.cells["base"]["text"].low < among.cells["base"]["text"].high


def test_a_run_named_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = full_run(tmp_path / "a")
    (tmp_path / "link").symlink_to(folder)
    for other in (folder, tmp_path / "link", folder / ".." / "a"):
        assert main(["report", str(folder), str(other), "--out", str(tmp_path / "o.html")]) == 2
        assert "one run, which would count twice" in capsys.readouterr().err
    assert not (tmp_path / "o.html").exists()


def test_more_curves_than_are_shown_are_said(tmp_path: Path) -> None:
    many = {f"b{i}/train/entropy": [0.5] * 20 for i in range(MAX_SHOWN + 1)}
    found = {p.title.split(" (")[0]: p for p in panels([read_run(write_run(tmp_path / "a", extra=many))])}
    assert found["entropy of the policy"].coverage == f"At most {MAX_SHOWN} curves are shown."
    assert found["reward on the branch's own prompts"].coverage == ""


def test_a_run_that_has_begun_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "phase": "rlvr", "x/train/reward": 0.5}))
    text = write_page([tmp_path], tmp_path / "page.html", PageOptions(refresh_seconds=5)).read_text()
    assert "No evaluation table yet" in text and '<meta http-equiv="refresh" content="5">' in text


def test_a_page_is_kept_fresh_until_somebody_stops_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        page.unlink()
        if len(naps) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("copd_megatron.cli.report.time.sleep", nap)
    folder = write_run(tmp_path / "run")
    page = folder / "report.html"
    assert main(["report", str(folder), "--follow", "7"]) == 130
    assert naps == [7, 7, 7] and not page.exists()


def test_the_command_writes_page_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = full_run(tmp_path / "a"), full_run(tmp_path / "b")
    assert main(["report", str(a)]) == 0
    assert (a / "report.html").is_file() and (a / "report.png").is_file()
    assert f"page: {a / 'report.html'}" in capsys.readouterr().out
    assert main(["report", str(a), str(b), "--out", str(tmp_path / "both.html")]) == 0
    assert (tmp_path / "both.html").is_file() and not (b / "report.png").exists()
    assert main(["report", str(a), str(tmp_path / "nowhere")]) == 2


CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)


def requests_of(page: Path, scratch: Path, *, width: int = 1200) -> set[str]:
    """The addresses that a page makes Chromium ask for, as its own log of the network names them. What the
    browser asks for by itself (its clock, its updates) has no origin."""
    assert CHROMIUM is not None
    log = scratch / "net.json"
    subprocess.run(
        [
            CHROMIUM,
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update"),
            *(f"--user-data-dir={scratch / 'profile'}", f"--log-net-log={log}"),
            *(f"--window-size={width},2000", f"--screenshot={scratch / 'page.png'}", page.as_uri()),
        ],
        check=True,
        capture_output=True,
        timeout=200,
    )
    events = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    asked = {
        e["url"] for e in events if "url" in e and e.get("initiator", "not an origin") != "not an origin"
    }
    return {address for address in asked if not address.startswith(("file:", "data:"))}


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; apt-get install chromium")
def test_a_browser_shows_it_and_requests_nothing(one: Path, tmp_path: Path) -> None:
    assert requests_of(one, tmp_path, width=400) == set()
    assert (tmp_path / "page.png").stat().st_size > 20_000
    control = tmp_path / "control.html"
    control.write_text("<img src=http://127.0.0.1:9/picture.png>")
    assert requests_of(control, tmp_path) == {"http://127.0.0.1:9/picture.png"}


@pytest.mark.parametrize(("step", "told"), [(10, True), (20, False), (None, False)])
def test_a_table_of_before_the_run_went_on_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], step: int | None, told: bool
) -> None:
    """A finished run that was started again with more cycles, and has not come to its end."""
    run = full_run(tmp_path / "run")
    save_table(run, {"base": {"text": 0.25}, "merged": {"text": 0.5}}, ["text"], step=step)
    assert main(["report", str(run)]) == 0
    words = "of step 10; the run has gone on to step 20 since"
    assert (words in capsys.readouterr().out) == (words in (run / "report.html").read_text()) == told
