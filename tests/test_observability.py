"""Prometheus, W&B, logs of many ranks, timelines and profiler windows; in one process."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families
from torch.distributed import HashStore

from copd_megatron.cli.main import main
from copd_megatron.config import Config, ConfigError, WandbConfig
from copd_megatron.config.schema import LoggingConfig
from copd_megatron.metrics.packages import check_packages, is_installed
from copd_megatron.metrics.prometheus import (
    MAX_CLIENTS,
    LastStep,
    PrometheusEndpoint,
    PrometheusTextfile,
    sample_name,
)
from copd_megatron.metrics.rank_log import (
    ConsoleFormatter,
    RankFormatter,
    RankPlace,
    Selection,
    follow,
    log_file,
    merged,
)
from copd_megatron.metrics.timeline import (
    PHASES,
    TimelineWriter,
    chrome_trace,
    phase_of,
    read_timelines,
    seconds_by_phase,
    write_trace,
)
from copd_megatron.topology.watch import Watch

METRICS = {
    "text/train/reward": 0.41,
    "text/timing/generation_seconds": 1.5,
    "text/cross/image/reward": 0.25,
    "text/validation/accuracy": 0.5,
    "text/validation/accuracy/image": 0.75,
    "copd/overlap@10/text-image": 0.62,
    "copd/teacher_gap/text<-image": -0.1,
    "image/train/loss": float("nan"),
    "image/train/grad_norm": float("inf"),
}


def place(rank: int, branch: str = "text", branch_rank: int = 0, size: int = 2) -> RankPlace:
    return RankPlace(rank=rank, branch=branch, branch_rank=branch_rank, branch_size=size)


# ---- Prometheus -------------------------------------------------------------------------------------------


def parsed(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """By Prometheus' own parser: (name, labels) to value; the run's label is left out."""
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.type == "gauge"
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("run") == 'my "run"'
            found[sample.name, tuple(sorted(labels.items()))] = sample.value
    return found


def test_paths_become_names_and_labels() -> None:
    assert sample_name("text/train/reward") == ("copd_train_reward", {"branch": "text"})
    assert sample_name("copd/overlap@10/a-b") == ("copd_overlap", {"k": "10", "edge": "a-b"})
    assert sample_name("copd/router_bytes/a<-b") == ("copd_router_bytes", {"edge": "a<-b"})
    assert sample_name("a/cross/b/reward") == ("copd_cross_reward", {"branch": "a", "teacher": "b"})
    assert sample_name("a/validation/accuracy") == ("copd_validation_accuracy", {"branch": "a"})
    assert sample_name("a/validation/accuracy/b") == (
        "copd_validation_accuracy_by_domain",
        {"branch": "a", "domain": "b"},
    )
    assert sample_name("a/x/y.z-1") == ("copd_x_y_z_1", {"branch": "a"})
    assert sample_name("alone") == ("copd_alone", {})


def test_prometheus_own_parser_reads_it() -> None:
    step = LastStep('my "run"', clock=lambda: 1234.5)
    assert parsed(generate_latest(step).decode()) == {}
    step.show(7, "opd", METRICS)
    found = parsed(generate_latest(step).decode())
    assert found["copd_step", ()] == 7 and found["copd_last_step_timestamp_seconds", ()] == 1234.5
    assert found["copd_phase_info", (("phase", "opd"),)] == 1
    assert found["copd_train_reward", (("branch", "text"),)] == 0.41
    assert found["copd_overlap", (("edge", "text-image"), ("k", "10"))] == 0.62
    assert math.isnan(found["copd_train_loss", (("branch", "image"),)])
    assert found["copd_train_grad_norm", (("branch", "image"),)] == float("inf")
    assert len(found) == len(METRICS) + 3
    # a scraper may ask for the newer format
    assert len(list(openmetrics_families(generate_openmetrics(step).decode()))) == len(METRICS) + 3


def test_the_textfile_is_replaced_as_a_whole(tmp_path: Path) -> None:
    """A reader that reads all the time never sees a part of a step."""
    path = tmp_path / "copd.prom"
    writer = PrometheusTextfile(path, run='my "run"')
    many = {f"text/train/value_{i}": float(i) for i in range(300)}
    seen: list[str] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            if path.exists():
                seen.append(path.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for step in range(1, 60):
        writer.write(step, "rlvr", many)
    done.set()
    reader.join()
    assert seen and all(text.count("\n") == 3 * (300 + 3) for text in seen)
    assert parsed(path.read_text())["copd_step", ()] == 59
    assert path.stat().st_mode & 0o777 == 0o644
    assert [p.name for p in tmp_path.iterdir()] == ["copd.prom"]


def test_a_folder_that_fails_during_the_run_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "textfiles"
    with pytest.raises(ConfigError, match=r"logging\.prometheus\.textfile: .*textfiles is not a folder"):
        PrometheusTextfile(folder / "copd.prom", run="x")
    folder.mkdir()
    writer = PrometheusTextfile(folder / "copd.prom", run="x")
    folder.rmdir()
    writer.write(1, "rlvr", {})
    writer.write(2, "rlvr", {})
    folder.mkdir()
    writer.write(3, "rlvr", {})
    assert [record.message.partition(" to ")[0] for record in caplog.records] == [
        "metrics are not written",
        "metrics are written",
    ]
    assert "copd_step" in (folder / "copd.prom").read_text()


def test_the_endpoint_answers_with_the_newest_step() -> None:
    endpoint = PrometheusEndpoint("127.0.0.1", 0, run='my "run"')
    address = f"http://127.0.0.1:{endpoint.port}"
    try:
        for step in (1, 2):
            endpoint.write(step, "rlvr", METRICS)
            with urllib.request.urlopen(f"{address}/metrics", timeout=10) as answer:
                assert answer.headers["Content-Type"] == CONTENT_TYPE_PLAIN_0_0_4
                assert parsed(answer.read().decode())["copd_step", ()] == step
        with pytest.raises(ConfigError, match=r"logging\.prometheus\.port: cannot listen on .* another port"):
            PrometheusEndpoint("127.0.0.1", endpoint.port, run="x")
    finally:
        endpoint.close()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{address}/metrics", timeout=10)


def test_silent_clients_hold_neither_threads_nor_the_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """300 that say nothing, some of which say a letter now and then: a scrape is answered all the same."""
    monkeypatch.setattr("copd_megatron.metrics.prometheus._Handler.timeout", 1.0)
    threads = threading.active_count()
    endpoint = PrometheusEndpoint("127.0.0.1", 0, run='my "run"')
    endpoint.write(1, "rlvr", METRICS)
    clients, most = [], 0
    try:
        for _ in range(300):
            clients.append(socket.create_connection(("127.0.0.1", endpoint.port), timeout=10))
            clients[-1].send(b"G")
            most = max(most, threading.active_count() - threads)
        began = time.monotonic()
        with urllib.request.urlopen(f"http://127.0.0.1:{endpoint.port}/metrics", timeout=10) as answer:
            assert parsed(answer.read().decode())["copd_step", ()] == 1
        assert time.monotonic() - began < 1.0, "it waited for nobody's timeout"
        assert 1 < most <= MAX_CLIENTS + 1
        deadline = time.monotonic() + 10
        while threading.active_count() > threads + 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert threading.active_count() == threads + 1, "the server's own thread is left"
    finally:
        for client in clients:
            client.close()
        endpoint.close()
    assert threading.active_count() == threads


def test_the_endpoint_is_for_this_machine_unless_asked_otherwise() -> None:
    assert LoggingConfig().prometheus.host == "127.0.0.1"


# ---- W&B and missing packages -----------------------------------------------------------------------------


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an interpreter that sees neither; a folder ``wandb`` in the working directory is not the package."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    check_packages(LoggingConfig())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("copd_megatron.metrics.packages.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"logging\.wandb\.enabled: the package wandb .*pip install wandb"):
        check_packages(LoggingConfig(wandb=WandbConfig(enabled=True)))
    with pytest.raises(ConfigError, match=r"logging\.tensorboard: the package tensorboard"):
        check_packages(LoggingConfig(tensorboard=True))


def test_a_folder_is_not_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "surely_no_package").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not is_installed("surely_no_package")
    assert is_installed("tensorboard")


_WANDB = """
import sys
from pathlib import Path
from copd_megatron.config import WandbConfig
from copd_megatron.metrics.wandb_writer import WandbWriter
options = WandbConfig(enabled=True, project="tests", tags=["a"], group="g")
writer = WandbWriter(Path(sys.argv[1]), "my run", options, {"run": {"seed": 1}})
for step in map(int, sys.argv[2:]):
    writer.write(step, "opd", {"text/train/reward": step / 8, "text/train/loss": float("nan")})
writer.close()
"""


@pytest.mark.skipif(not is_installed("wandb"), reason="the optional package wandb is not installed")
def test_wandb_logs_offline_and_goes_on_in_the_same_run(tmp_path: Path) -> None:
    """The real wandb writes its files, twice: the second time as a run that resumes after step 2."""
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    for steps in (["1", "2"], ["2", "3"]):
        subprocess.run(
            [sys.executable, "-c", _WANDB, str(tmp_path), *steps], check=True, env=environment, timeout=120
        )
    run_id = (tmp_path / "wandb_run_id").read_text().strip()
    folders = sorted((tmp_path / "wandb").glob(f"offline-run-*-{run_id}"))
    assert folders
    logged = b"".join(path.read_bytes() for f in folders for path in f.glob(f"run-{run_id}.wandb"))
    assert b"text/train/reward" in logged and b"0.375" in logged and b"my run" in logged
    assert b"seed" in logged


# ---- logs -------------------------------------------------------------------------------------------------


def record(message: str, created: float, level: int = logging.INFO, **extra: Any) -> logging.LogRecord:
    made = logging.LogRecord("copd.test", level, __file__, 1, message, None, extra.get("exc_info"))
    made.created = created
    return made


def write_logs(folder: Path) -> None:
    """Two ranks that speak in turns, one of them with a traceback, and a line from somewhere else."""
    try:
        raise ValueError("two\nlines")
    except ValueError:
        failure = sys.exc_info()
    first, second = RankFormatter(place(0)), RankFormatter(place(2, "image", 0, 1))
    log_file(folder, 0).parent.mkdir(parents=True)
    log_file(folder, 0).write_text(
        "\n".join(
            [
                first.format(record("one", 1.0)),
                "printed by a library",
                first.format(record("three", 3.0, logging.ERROR, exc_info=failure)),
                "",
            ]
        )
    )
    log_file(folder, 2).write_text(
        "\n".join(
            [second.format(record("two", 2.0, logging.WARNING)), second.format(record("four", 3.5)), ""]
        )
    )


def test_ranks_logs_read_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_logs(tmp_path)
    lines = list(merged(tmp_path))
    text = "\n".join(lines)
    places = [text.index(word) for word in ("one", "by a library", "two", "three", "ValueError", "four")]
    assert places == sorted(places)
    # branch and rank on every line of a record, those of the traceback too
    assert sum("[text 0/2, rank 0]" in line for line in lines) == len(lines) - 3
    assert list(merged(tmp_path, Selection(branch="image"))) == [
        line for line in lines if "[image 0/1, rank 2]" in line
    ]
    assert len(list(merged(tmp_path, Selection(level="error", rank=0)))) == 6
    assert main(["logs", str(tmp_path), "--level", "WARNING", "--branch", "image"]) == 0
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.0{6} WARNING \[image 0/1, rank 2\] copd\.test: two\n",
        capsys.readouterr().out,
    )
    for option, message in (
        (["--branch", "nope"], "the branches text, image"),
        (["--rank", "7"], "ranks 0 to 2"),
    ):
        assert main(["logs", str(tmp_path), *option]) == 2
        assert message in capsys.readouterr().err
    assert main(["logs", str(tmp_path / "nothing")]) == 2
    assert "logging.rank_files" in capsys.readouterr().err


def test_a_line_about_another_branch_counts_as_that_branchs(tmp_path: Path) -> None:
    """Rank 0 writes one line per branch and step."""
    about = record("step 1/4", 4.0)
    about.branch = "image"
    write_logs(tmp_path)
    with log_file(tmp_path, 0).open("a") as file:
        file.write(RankFormatter(place(0)).format(about) + "\n")
    shown = list(merged(tmp_path, Selection(branch="image")))
    assert [line.partition("] ")[2] for line in shown] == [
        "copd.test: two",
        "copd.test: four",
        "copd.test: step 1/4",
    ]
    assert "[image, rank 0]" in shown[-1]
    assert not any("step 1/4" in line for line in merged(tmp_path, Selection(branch="text")))
    assert any("step 1/4" in line for line in merged(tmp_path, Selection(rank=0)))


def test_the_console_spends_few_characters_on_its_prefix() -> None:
    shown = ConsoleFormatter(place(2, "image", 0, 1))
    ours = record("resumed from step 3", 1.0)
    ours.name = "copd_megatron.branch.checkpoints"
    assert re.fullmatch(r"\d\d-\d\d \d\d:\d\d:\d\d \[image\] resumed from step 3", shown.format(ours))
    ours.branch = "video"
    assert shown.format(ours).endswith(" [video] resumed from step 3")
    warning = shown.format(record("two\nlines", 1.0, logging.WARNING)).splitlines()
    assert [line[15:] for line in warning] == [
        "WARNING [image 0/1, rank 2] copd.test: two",
        "WARNING [image 0/1, rank 2] copd.test: lines",
    ]


def test_logs_can_be_followed(tmp_path: Path) -> None:
    """What is there, then what is added, half lines once they are whole, ranks that come later."""
    write_logs(tmp_path)
    before = list(merged(tmp_path))
    polls = 0

    def more() -> bool:
        nonlocal polls
        polls += 1
        if polls == 2:
            with log_file(tmp_path, 0).open("a") as file:
                file.write(RankFormatter(place(0)).format(record("whole", 9.0))[:-2])
            log_file(tmp_path, 1).write_text(RankFormatter(place(1)).format(record("late", 8.0)) + "\n")
        if polls == 3:
            with log_file(tmp_path, 0).open("a") as file:
                file.write("le\n")
        return polls == 3

    lines = list(follow(tmp_path, poll_seconds=0.01, stop=more))
    assert lines[: len(before)] == before
    assert [line.rpartition(" ")[2] for line in lines[len(before) :]] == ["late", "whole"]


_LOGS_TO_A_FULL_DISK = """
import logging
from pathlib import Path
from copd_megatron.metrics import rank_log
rank_log.log_file = lambda folder, rank: Path("/dev/full")
rank_log.open_appending = lambda path, anew: open(path, "ab", buffering=0)  # else a device is refused
rank_log.start_logging(
    rank_log.RankPlace(rank=1, branch="text", branch_rank=1, branch_size=2), "INFO", folder=Path("/dev")
)
for number in range(3):
    logging.getLogger("x").warning("warning %d", number)
    logging.getLogger("x").info("quiet on this rank")
"""


def test_a_full_disk_does_not_silence_the_console() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _LOGS_TO_A_FULL_DISK], capture_output=True, text=True, check=True
    )
    said = done.stderr.splitlines()
    assert said[0].endswith("WARNING [text 1/2, rank 1] x: warning 0")
    assert [line for line in said if "[text" not in line] == [
        "/dev/full: lines are lost: No space left on device"
    ]
    assert len(said) == 4


_ENDS_BY_AN_EXCEPTION = """
import sys
from pathlib import Path
import torch.distributed as dist
from copd_megatron.metrics import rank_log
place = rank_log.RankPlace(rank=1, branch="text", branch_rank=1, branch_size=2)
rank_log.start_logging(place, "INFO", folder=Path(sys.argv[1]))
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # it has a hook of its own
raise ValueError("no weights")
"""


def test_the_exception_that_ends_a_rank_is_in_its_log(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _ENDS_BY_AN_EXCEPTION, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 1 and "ValueError: no weights" in done.stderr
    lines = list(merged(tmp_path, Selection(level="CRITICAL")))
    assert lines[0].endswith(
        "[text 1/2, rank 1] copd_megatron.metrics.rank_log: this rank ends by ValueError: no weights"
    )
    assert lines[-1].endswith("CRITICAL [text 1/2, rank 1] ValueError: no weights")


# ---- timeline ---------------------------------------------------------------------------------------------


def test_every_operation_of_the_code_has_a_phase() -> None:
    """All that the sources name: a new one must be told whether it is work or waiting."""
    root = Path(__file__).resolve().parents[1] / "copd_megatron"
    names = set()
    for path in root.rglob("*.py"):
        if path.name == "watch.py":
            continue
        text = path.read_text()
        names |= set(re.findall(r"\.operation\(\s*f?\"([a-z_.]+)", text))
        names |= set(re.findall(r"_operation\(\"([a-z_. ]+)\"", text))
        names |= set(re.findall(r"(?:all_gather_objects|branch_gather)\([^\n]*\"([a-z_.]+)\"\)", text))
    assert {"rollout.generate", "opd.score", "checkpoint.agree", "metrics.gather", "weight_sync"} <= names
    assert {name for name in names if phase_of(name) == "other"} == set()


def write_timeline(folder: Path, rank: int, branch: str, *, clock: float, session: int = 0) -> None:
    """One step of 10 s: samples, grades inside of it, then waits and trains; ``clock``: how far this rank's
    clock is ahead. The rest of the step is the loop's own."""
    origin = 100.0 * session
    writer = TimelineWriter(folder, place(rank, branch), aligned_at=origin + clock)
    writer._pending = []  # the header with this machine's clock is on the disk; replaced below
    path = folder / "timeline" / f"rank_{rank:05d}.jsonl"
    *lines, header = path.read_text().splitlines()
    about = {**json.loads(header), "host": branch, "unix_minus_monotonic": 0.0}
    path.write_text("".join(line + "\n" for line in [*lines, json.dumps(about)]))

    def span(name: str, begin: float, end: float) -> None:
        writer.operation(name, origin + clock + begin, origin + clock + end)

    busy = 6.0 if branch == "text" else 2.0
    span("rollout.generate > rewards.grade", busy - 1, busy)
    span("rollout.generate", 1.0, busy)
    span("opd.exchange 1 > opd.receive rows text<-image", busy, 7.0)
    span("opd.exchange 1", busy, 7.5)
    span("policy.forward_backward", 7.5, 9.0)
    writer.step(session + 1, "opd", origin + clock + 0.5, origin + clock + 10.0)
    span("checkpoint.write", 10.0, 11.0)
    writer.close()


def test_waiting_shows_in_the_phases(tmp_path: Path) -> None:
    """The branch that samples for less long waits for the other; clocks of two hosts differ by 40 s."""
    write_timeline(tmp_path, 0, "text", clock=0.0)
    write_timeline(tmp_path, 1, "image", clock=40.0)
    table = seconds_by_phase(read_timelines(tmp_path))
    expected = {
        "text": {"sample": 4, "grade": 1, "wait": 1, "route": 0.5, "train": 1.5, "other": 1.5},
        "image": {"grade": 1, "wait": 5, "route": 0.5, "train": 1.5, "other": 1.5},
    }
    for branch, row in expected.items():
        assert table[branch] == pytest.approx({**dict.fromkeys(PHASES, 0), **row})
    # on one clock: both finish the exchange at the same instant
    ends = [o.end for t in read_timelines(tmp_path) for o in t.operations if o.name == "opd.exchange 1"]
    assert len(ends) == 2 and ends[0] == pytest.approx(ends[1])


def test_the_trace_has_a_process_row_per_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for session in (0, 1):
        write_timeline(tmp_path, 0, "text", clock=0.0, session=session)
        write_timeline(tmp_path, 1, "image", clock=0.0, session=session)
    assert main(["timeline", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "waiting" in said and "ui.perfetto.dev" in said
    events = json.loads((tmp_path / "timeline" / "trace.json").read_text())["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {0: "text rank 0", 1: "image rank 0"}
    spans = [e for e in events if e["ph"] == "X"]
    assert min(e["ts"] for e in spans) == 0
    steps = [(e["pid"], e["name"]) for e in spans if e["tid"] == 0]
    assert sorted(steps) == [(r, f"step {n} (opd)") for r in (0, 1) for n in (1, 2)]
    for rank in (0, 1):
        phases = sorted((e["ts"], e["ts"] + e["dur"]) for e in spans if e["tid"] == 1 and e["pid"] == rank)
        assert all(one[1] <= other[0] + 0.2 for one, other in pairwise(phases))
    waits = [e["dur"] for e in spans if e["tid"] == 1 and e["cat"] == "wait" and e["pid"] == 1]
    assert waits == pytest.approx([5e6, 5e6])
    path, _ = write_trace(tmp_path, tmp_path / "second.json", steps=(2, 2))
    shown = [e for e in json.loads(path.read_text())["traceEvents"] if e["ph"] == "X"]
    assert {e["name"] for e in shown if e["tid"] == 0} == {"step 2 (opd)"}
    for arguments, message in ((["--steps", "9"], "no steps from 9"), (["--steps", "x"], "write 3, or 3-5")):
        assert main(["timeline", str(tmp_path), *arguments]) == 2
        assert message in capsys.readouterr().err


def test_a_torn_line_and_a_strange_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_timeline(tmp_path, 0, "text", clock=0.0)
    path = tmp_path / "timeline" / "rank_00000.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"path": "half')
    assert len(read_timelines(tmp_path)[0].operations) == 6
    TimelineWriter(tmp_path, place(0), aligned_at=0.0).close()  # a restart: the torn line goes
    assert len(read_timelines(tmp_path)) == 2
    path.write_text(whole + "nonsense\n")
    assert main(["timeline", str(tmp_path)]) == 2
    assert f"line {whole.count(chr(10)) + 1} is not a line of a timeline" in capsys.readouterr().err
    assert main(["timeline", str(tmp_path / "nothing")]) == 2
    assert "profiling.timeline=true" in capsys.readouterr().err


def test_a_watch_tells_its_operations(tmp_path: Path) -> None:
    """The real watch and the real writer; an operation that fails is told too."""
    watch = Watch(HashStore(), 0, {"text": [0]}, timeout_seconds=60)
    writer = TimelineWriter(tmp_path, place(0, size=1), aligned_at=time.monotonic())
    watch.recorder = writer.operation
    begin = time.monotonic()
    with watch.operation("rollout.generate"):
        with watch.operation("rewards.grade"):
            time.sleep(0.05)
        time.sleep(0.02)
    with pytest.raises(KeyError), watch.operation("weight_sync"):
        raise KeyError
    writer.step(1, "rlvr", begin, time.monotonic())
    writer.close()
    watch.close()
    (timeline,) = read_timelines(tmp_path)
    assert [(o.name, o.depth) for o in timeline.operations] == [
        ("rewards.grade", 1),
        ("rollout.generate", 0),
        ("weight_sync", 0),
    ]
    row = seconds_by_phase([timeline])["text"]
    assert 0.05 <= row["grade"] < 0.2 and 0.02 <= row["sample"] < 0.2
    assert abs(timeline.operations[0].end - time.time()) < 30
    assert chrome_trace([])["traceEvents"] == []


def test_defaults_write_nothing_extra() -> None:
    config = Config()
    assert not (config.logging.tensorboard or config.logging.wandb.enabled or config.profiling.timeline)
    assert config.logging.prometheus.textfile is None and config.logging.prometheus.port is None
