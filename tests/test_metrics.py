"""Metrics: reduction over real Gloo ranks that hold different names, writers, console and table."""

from __future__ import annotations

import io
import json
import logging
import math
import shutil
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rich.console import Console

from copd_megatron.errors import RunStorageError
from copd_megatron.evaluation.table import render_table, save_table
from copd_megatron.metrics.console import ConsoleView
from copd_megatron.metrics.reduction import Metrics
from copd_megatron.metrics.writers import JsonlWriter, TensorBoardWriter
from tests.support.disks import fill
from tests.support.distributed import run_distributed

NAN, INF = math.nan, math.inf


# ------------------------------------------------------------------------------------ one process


def test_kinds_without_a_group() -> None:
    metrics = Metrics()
    metrics.mean("reward", 3.0, 4)
    metrics.mean("reward", torch.tensor(1.0), torch.tensor(4))
    metrics.mean("nothing", 0.0, 0)
    metrics.means("loss/", {"ratio": torch.tensor([6.0]), "kl": 1.5}, torch.tensor(3.0))
    metrics.total("tokens", 5)
    metrics.total("tokens", torch.tensor(7))
    for number in (2.0, -1.0, torch.tensor(9.0, requires_grad=True)):
        metrics.maximum("max", number)
        metrics.minimum("min", number)
        metrics.value("lr", number)
    metrics.maximum("bad", 1.0)
    metrics.maximum("bad", NAN)
    result = metrics.reduce()
    assert math.isnan(result.pop("bad"))
    assert result == {
        "loss/kl": 0.5,
        "loss/ratio": 2.0,
        "lr": 9.0,
        "max": 9.0,
        "min": -1.0,
        "reward": 0.5,
        "tokens": 12.0,
    }
    assert list(result) == sorted(result)
    assert metrics.reduce() == {}


def test_infinities_and_nan_in_sums_come_through() -> None:
    metrics = Metrics()
    for name, numbers in {"a": (1.0, INF), "b": (INF, -INF), "c": (NAN, 1.0)}.items():
        for number in numbers:
            metrics.total(name, number)
    result = metrics.reduce()
    assert result["a"] == INF and math.isnan(result["b"]) and math.isnan(result["c"])


def test_one_name_one_kind() -> None:
    metrics = Metrics()
    metrics.total("x", 1)
    with pytest.raises(ValueError, match="metric 'x' was collected as total and now as mean"):
        metrics.mean("x", 1)


# -------------------------------------------------------------------------------------- three ranks


class CountingGroup:
    """A real group that counts the collective calls going through it."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self.calls: list[str] = []

    def size(self) -> int:
        return self._group.size()

    def allreduce(self, tensors: list[torch.Tensor], options: Any) -> Any:
        self.calls.append("allreduce")
        return self._group.allreduce(tensors, options)

    def allgather(self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor]) -> Any:
        self.calls.append("allgather")
        return self._group.allgather(outputs, inputs)


def reduce_on_three_ranks() -> dict[str, Any]:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    group = CountingGroup(dist.group.WORLD)
    metrics = Metrics()
    steps: list[dict[str, float]] = []
    calls: list[int] = []

    def reduce() -> None:
        group.calls.clear()
        steps.append(metrics.reduce(group))
        calls.append(len(group.calls))

    # 0: different names on each rank; rank 0 holds a NaN that a max must not lose.
    metrics.mean("all/reward", float(rank), rank + 1)
    metrics.total(f"rank{rank}/tokens", 10 * rank)
    if rank == 2:
        metrics.mean("last/loss", torch.tensor(3.0), 2)
    metrics.maximum("all/longest", NAN if rank == 0 else rank)
    metrics.maximum("all/memory", -5.0 - rank)
    metrics.minimum("all/shortest", 5.0 + rank)
    metrics.value("all/lr", 0.125)
    reduce()
    # 1: the same names or fewer, nothing at all on rank 1: no new agreement.
    if rank != 1:
        metrics.mean("all/reward", 1.0, 1)
        metrics.maximum("all/longest", float(rank))
    reduce()
    # 2: a new name on rank 1 alone.
    if rank == 1:
        metrics.mean("copd/overlap@10/text-image", 9.0, 10)
    metrics.mean("all/reward", float(rank))
    reduce()
    # 3: back to the steady state with the name of step 2.
    if rank == 0:
        metrics.mean("copd/overlap@10/text-image", 1.0, 2)
    reduce()
    # 4: one name, two kinds, on two ranks: every rank must hear of it.
    (metrics.total if rank == 0 else metrics.mean)("all/clash", 1.0)
    try:
        metrics.reduce(group)
        clash = "not noticed"
    except ValueError as error:
        clash = str(error)
    # 5: and the ranks are still in step. Also: values that differ between ranks are reported.
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("copd_megatron.metrics.reduction").addHandler(handler)
    metrics.value("all/lr", 0.125 + 0.125 * rank)
    reduce()
    # A group built by hand, as the router's is, that torch.distributed does not know.
    store = dist.PrefixStore("bare", dist.distributed_c10d._get_default_store())
    bare = dist.ProcessGroupGloo(store, rank, 3, timedelta(seconds=60))
    metrics.total("ranks", 1)
    over_bare = metrics.reduce(bare)
    metrics.total("mine", rank)
    alone = metrics.reduce()
    dist.destroy_process_group()
    return {
        "steps": steps, "calls": calls, "clash": clash, "records": records, "bare": over_bare, "alone": alone,
    }  # fmt: skip


def test_ranks_with_different_names() -> None:
    results = run_distributed(reduce_on_three_ranks, 3)
    for result in results:
        first = result["steps"][0]
        assert math.isnan(first.pop("all/longest"))
        assert list(first) == sorted(first)
        assert first == {
            "all/reward": 3 / 6,
            "rank0/tokens": 0.0,
            "rank1/tokens": 10.0,
            "rank2/tokens": 20.0,
            "last/loss": 1.5,
            "all/memory": -5.0,
            "all/shortest": 5.0,
            "all/lr": 0.125,
        }
        assert result["steps"][1] == {"all/reward": 1.0, "all/longest": 2.0}
        assert result["steps"][2] == {"all/reward": 1.0, "copd/overlap@10/text-image": 0.9}
        assert result["steps"][3] == {"copd/overlap@10/text-image": 0.5}
        assert result["steps"][4] == {"all/lr": 0.375}
        # Two gathers to agree, then two all-reduces; the steady state costs two; a new name one more
        # max all-reduce, that tells of it, and the agreement.
        assert result["calls"] == [4, 2, 5, 2, 2]
        assert "'all/clash' is total and, on group rank 1, mean" in result["clash"]
        assert len(result["records"]) == 1 and "from 0.125 to 0.375" in result["records"][0]
        assert result["bare"] == {"ranks": 3.0}
    assert [result["alone"] for result in results] == [{"mine": 0.0}, {"mine": 1.0}, {"mine": 2.0}]


# ------------------------------------------------------------------------------------------ writers


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_jsonl_lines_are_there_at_once(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    writer = JsonlWriter(path)
    writer.write(1, "rlvr", {"text/train/reward": 0.25, "copd/overlap@10/text-image": 1.0})
    assert read_lines(path) == [
        {"step": 1, "phase": "rlvr", "text/train/reward": 0.25, "copd/overlap@10/text-image": 1.0}
    ]
    with pytest.raises(ValueError, match="cannot be named 'step'"):
        writer.write(2, "opd", {"step": 2.0})
    writer.close()


def test_jsonl_writes_null_and_warns_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    for step in (1, 2):
        writer.write(step, "opd", {"a": NAN, "b": -INF, "c": 1.5})
    writer.close()
    assert read_lines(writer.path)[1] == {"step": 2, "phase": "opd", "a": None, "b": None, "c": 1.5}
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 2 and "metric a is nan at step 1" in warnings[0]


@pytest.mark.parametrize("tail", ['{"step": 3, "pha', "x" * 200_000])
def test_jsonl_drops_a_torn_last_line(tmp_path: Path, tail: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path)
    for step in (1, 2):
        writer.write(step, "rlvr", {"a": step})
    writer.close()
    with path.open("a") as file:
        file.write(tail)
    writer = JsonlWriter(path)
    writer.write(3, "rlvr", {"a": 3})
    writer.close()
    assert [line["step"] for line in read_lines(path)] == [1, 2, 3]
    assert f"incomplete line of {len(tail)} bytes" in caplog.text


def test_jsonl_with_nothing_but_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step"')
    JsonlWriter(path).close()
    assert path.read_bytes() == b""


def test_a_full_disk_ends_the_metrics_with_one_sentence(make_disk: Callable[[int], Path]) -> None:
    small_disk = make_disk(2 << 20)
    path = small_disk / "run" / "metrics.jsonl"
    writer = JsonlWriter(path)
    writer.write(1, "rlvr", {"a": 1.0})
    filler = fill(small_disk)
    with pytest.raises(RunStorageError) as caught:
        for step in range(2, 1000):
            whole = path.read_bytes()
            writer.write(step, "rlvr", {"a": 1.0})
    said = str(caught.value)
    assert str(path) in said and f"step {step} cannot" in said and "No space left on device" in said
    assert "free some space" in said and "start the same command again" in said
    assert path.read_bytes() == whole, "the file ends with the line before"
    writer.close()
    filler.unlink()
    again = JsonlWriter(path)
    again.write(step, "rlvr", {"a": 1.0})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == list(range(1, step + 1))


def test_metrics_in_a_folder_that_was_removed_are_lost_and_that_is_said(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    writer = JsonlWriter(path)
    shutil.rmtree(path.parent)
    with pytest.raises(RunStorageError, match=r"No such file or directory.*restore the folder"):
        writer.write(1, "rlvr", {"a": 1.0})


def test_jsonl_truncates_for_a_resume(tmp_path: Path) -> None:
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    for step in range(5):
        writer.write(step, "rlvr", {"a": step})
    writer.truncate_after(2)
    writer.write(3, "opd", {"a": 30})
    writer.close()
    assert [(line["step"], line["a"]) for line in read_lines(writer.path)] == [
        (0, 0),
        (1, 1),
        (2, 2),
        (3, 30),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_jsonl_names_a_corrupt_line_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "phase": "rlvr"}\nnot json\n')
    writer = JsonlWriter(path)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is not a metrics line"):
        writer.truncate_after(1)
    writer.write(2, "rlvr", {})
    writer.close()
    assert len(path.read_text().splitlines()) == 3


def test_tensorboard_holds_the_scalars(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = TensorBoardWriter(tmp_path)
    for step in (1, 2, 3):
        writer.write(step, "opd", {"copd/overlap@10/text-image": step / 4, "bad": NAN})
    writer.truncate_after(2)
    writer.write(3, "opd", {"copd/overlap@10/text-image": 1.0})
    writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Tags()["scalars"] == ["copd/overlap@10/text-image"]
    scalars = [(event.step, event.value) for event in events.Scalars("copd/overlap@10/text-image")]
    assert scalars == [(1, 0.25), (2, 0.5), (3, 1.0)]


# ------------------------------------------------------------------------------------------ console


STEP = {
    "text/train/reward": 0.4125,
    "text/train/entropy": 1.25,
    "text/perf/tokens_per_second": 5230.4,
    "image/train/reward": NAN,
    "copd/overlap@10/text-image": 0.9,
    "copd/overlap@10/video-text": 0.7,
    "copd/sym_kl/text-image": 0.1,
}


def make_view(console: Console) -> ConsoleView:
    times = iter(range(0, 1000, 10))
    return ConsoleView(["text", "image", "video"], 12, console=console, clock=lambda: float(next(times)))


def test_console_lines() -> None:
    view = make_view(Console(file=io.StringIO(), force_terminal=False))
    assert [line.eta_seconds for line in view.lines(4, "rlvr", {})] == [None] * 3
    text, image, video = (line.cells() for line in view.lines(5, "opd", STEP))
    assert text == ["text", "opd", "5/12", "0.412", "1.250", "0.800", "5,230", "0:01:10"]
    assert image == ["image", "opd", "5/12", "nan", "-", "0.900", "-", "0:01:10"]
    assert video[5] == "0.700"
    view.truncate_after(2)
    assert view.lines(3, "opd", {})[0].eta_seconds is None


def test_console_logs_one_line_a_branch_where_there_is_no_terminal(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    view = make_view(Console(file=io.StringIO(), force_terminal=False))
    view.write(1, "rlvr", STEP)
    view.close()
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 3
    assert messages[0] == (
        "branch text  phase rlvr  step 1/12  reward 0.412  entropy 1.250  overlap 0.800  "
        "tokens/s 5,230  ETA -"
    )


def test_console_on_a_terminal_redraws_and_keeps_log_lines_apart() -> None:
    screen = io.StringIO()
    handler = logging.StreamHandler(sys.stderr)
    original = handler.stream
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        view = make_view(Console(file=screen, force_terminal=True, width=100, _environ={}))
        view.write(1, "rlvr", STEP)
        root.warning("a bad sample was skipped")
        view.write(2, "opd", STEP)
        assert handler.stream is not original
        view.close()
        assert handler.stream is original
    finally:
        root.removeHandler(handler)
    shown = screen.getvalue()
    assert "a bad sample was skipped" in shown
    assert "1/12" in shown and "2/12" in shown and "tokens/s" in shown
    assert "\x1b[1A" in shown


# -------------------------------------------------------------------------------------------- table


ROWS = {
    "base": {"text": 0.3, "image": 0.25},
    "text": {"text": 0.5, "image": NAN},
    "merged": {"text": 1.0, "image": 0.5},
}


def test_table_as_text() -> None:
    assert render_table(ROWS, ["text", "image"], num_prompts={"text": 200}) == "\n".join(
        [
            "model   text (n=200)  image  mean",
            "------  ------------  -----  ----",
            "base            30.0   25.0  27.5",
            "text            50.0      -     -",
            "merged         100.0   50.0  75.0",
        ]
    )


def test_table_as_markdown() -> None:
    assert render_table({"a|b": {"text": 0.5}}, ["text"], style="markdown") == "\n".join(
        ["| model    | text | mean |", "| -------- | ---: | ---: |", "| a&#124;b | 50.0 | 50.0 |"]
    )


def test_table_is_saved_three_times(tmp_path: Path) -> None:
    paths = save_table(tmp_path / "run", ROWS, ["text", "image"], num_prompts={"text": 200, "image": 100})
    assert [path.name for path in paths] == ["evaluation.txt", "evaluation.md", "evaluation.json"]
    assert "base" in paths[0].read_text() and paths[1].read_text().startswith("| model")
    saved = json.loads(paths[2].read_text())
    assert saved["domains"] == ["text", "image"] and saved["num_prompts"] == {"text": 200, "image": 100}
    assert saved["accuracy"]["merged"] == {"text": 1.0, "image": 0.5, "mean": 0.75}
    assert saved["accuracy"]["text"] == {"text": 0.5, "image": None, "mean": None}


@pytest.mark.parametrize(
    ("rows", "columns", "match"),
    [
        (
            {"base": {"text": 30.0}},
            ["text"],
            r"accuracy of 'base' on 'text' is 30.0; it must be a fraction in \[0, 1\]",
        ),
        ({"base": {"audio": 0.3}}, ["text"], r"row 'base' has domains \['audio'\]"),
        ({}, ["mean"], "cannot be named 'mean'"),
    ],
)
def test_table_refuses(rows: dict[str, dict[str, float]], columns: list[str], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        render_table(rows, columns)


def test_a_student_of_a_frozen_teacher_shows_their_overlap() -> None:
    """Only branches that train have a line."""
    view = ConsoleView(["student"], 4)
    (line,) = view.lines(1, "opd", {"copd/overlap@10/student-text": 0.6, "copd/overlap@10/text-image": 0.1})
    assert line.overlap == 0.6
