"""What stands where the product writes: links are not written through, FIFOs are not waited for, and nothing
that the product did not make is replaced."""

from __future__ import annotations

import ast
import glob
import logging
import os
import resource
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import pytest

from copd_megatron.cli.main import main
from copd_megatron.cli.output import refuse_other, refuse_other_record
from copd_megatron.data import remote
from copd_megatron.data.convert.write import NewSample, write_shards
from copd_megatron.data.globs import Budget, names_like
from copd_megatron.data.media import MAX_BYTES
from copd_megatron.data.samples import SampleRef
from copd_megatron.data.shards import ShardSet, expand_patterns, index_shard
from copd_megatron.data.tar_scan import TarDamageError
from copd_megatron.errors import BadSampleError, ConfigError, DataError
from copd_megatron.hf.appear import appear
from copd_megatron.hf.companions import copy_companions
from copd_megatron.launch.lock import RunLock
from copd_megatron.merge.recipe import read_recipe
from copd_megatron.merge.target import refuse_other_report
from copd_megatron.metrics.prometheus import PrometheusTextfile
from copd_megatron.metrics.rank_log import (
    RankPlace,
    _configured_branches,
    check_selection,
    follow,
    merged,
    start_logging,
)
from copd_megatron.metrics.rank_log import Selection as LogSelection
from copd_megatron.planner.machine import read_machine, write_machine
from copd_megatron.samples.audit import read_cases
from copd_megatron.topology.job_end import JobEnd
from tests.support.shards import scan_tar

ROOT = Path(__file__).resolve().parents[1]
PLACE = RankPlace(rank=0, branch="text", branch_rank=0, branch_size=1)
SAMPLE = b'{"prompt": "2 + 2?", "answer": "4", "verifier": "math"}'
LINE = "2026-01-31 12:00:00.{:06d} INFO    [text 0/1, rank {}] x: y\n"


@pytest.fixture
def root_logger() -> Iterator[None]:
    """The root logger as it was before."""
    root = logging.getLogger()
    handlers, level, hook = root.handlers[:], root.level, sys.excepthook
    root.handlers.clear()
    yield
    for handler in root.handlers:
        handler.close()
    root.handlers[:], root.level = handlers, level
    sys.excepthook = hook


# ---- a run directory -------------------------------------------------------------------------------------


def take_lock(run: Path) -> None:
    with RunLock(run):
        pass


def leave_report(run: Path) -> None:
    end = JobEnd(None, {}, heartbeat_seconds=1, report_dir=run, hosts_store=False, store_rank=None)  # type: ignore[arg-type]
    end._leave_report("text", 0, "stuck \ud800", False)


WRITERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "lock": ("run.lock", take_lock),
    "log": ("logs/rank_00000.log", lambda run: start_logging(PLACE, "INFO", folder=run)),
    "new log": ("logs/rank_00000.log", lambda run: start_logging(PLACE, "INFO", folder=run, append=False)),
    "lock of the cache": (".lock", lambda run: remote._alone(run).__enter__()),
}


@pytest.mark.usefixtures("root_logger")
@pytest.mark.parametrize("kind", ["link", "dangling link", "FIFO", "folder"])
@pytest.mark.parametrize("what", WRITERS)
def test_what_is_appended_to_is_a_file_of_its_own(what: str, kind: str, tmp_path: Path) -> None:
    name, write = WRITERS[what]
    path, mine = tmp_path / "run" / name, tmp_path / "mine"
    path.parent.mkdir(parents=True)
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(mine)
        if kind == "link":
            mine.write_text("precious")
    began = time.monotonic()
    with pytest.raises(OSError, match=path.name):
        write(tmp_path / "run")
    assert time.monotonic() - began < 30
    assert (mine.read_text() == "precious") if kind == "link" else not mine.exists()


def test_reports_and_metrics_are_written_through_no_link(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("precious")
    for name in ("stuck_rank_00000.txt", "copd.prom"):
        (tmp_path / name).symlink_to(mine)
    (tmp_path / f".copd.prom.{os.getpid()}.partial").symlink_to(mine)
    leave_report(tmp_path)
    PrometheusTextfile(tmp_path / "copd.prom", run="r").write(1, "rlvr", {"text/train/reward": 0.5})
    assert mine.read_text() == "precious"
    assert "stuck" in (tmp_path / "stuck_rank_00000.txt").read_text()
    assert (tmp_path / "copd.prom").stat().st_mode & 0o777 == 0o644


def test_a_watch_waits_for_no_reader_of_its_report(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "stuck_rank_00000.txt")
    leave_report(tmp_path)
    assert "stacks of text" in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["link", "dangling link", "file", "folder"])
def test_an_exported_folder_takes_any_place(kind: str, tmp_path: Path) -> None:
    target, mine = tmp_path / "text", tmp_path / "mine"
    if kind == "file":
        target.write_text("x")
    elif kind == "folder":
        target.mkdir()
    else:
        target.symlink_to(mine)
        if kind == "link":
            mine.mkdir()
            (mine / "a").touch()
    (tmp_path / "text.partial").mkdir()
    (tmp_path / "text.partial" / "config.json").touch()
    appear(tmp_path / "text.partial", target)
    assert (target / "config.json").exists() and not target.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == (
        ["mine", "text"] if kind == "link" else ["text"]
    )
    assert kind != "link" or (mine / "a").exists()


def test_private_files_do_not_get_into_what_is_published(tmp_path: Path) -> None:
    secret, model, out = tmp_path / "id_rsa", tmp_path / "model", tmp_path / "out"
    secret.write_text("PRIVATE KEY")
    model.mkdir()
    out.mkdir()
    (model / "config.json").write_text("{}")
    (model / "vocab.txt").symlink_to(secret)
    with pytest.raises(OSError, match="link out of"):
        copy_companions(model, out)
    assert not (out / "vocab.txt").exists()


def test_models_of_the_hub_are_links_to_their_own_blobs(tmp_path: Path) -> None:
    hub, out = tmp_path / "models--a--b", tmp_path / "out"
    (hub / "blobs").mkdir(parents=True)
    (hub / "snapshots/1").mkdir(parents=True)
    out.mkdir()
    (hub / "blobs/77").write_text("{}")
    (hub / "snapshots/1/config.json").symlink_to("../../blobs/77")
    copy_companions(hub / "snapshots/1", out)
    assert (out / "config.json").read_text() == "{}"


# ---- logs ------------------------------------------------------------------------------------------------


def test_logs_of_more_ranks_than_a_process_may_open_files(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    for rank in range(200):
        (tmp_path / f"logs/rank_{rank:05d}.log").write_text(LINE.format(rank, rank) + LINE.format(900, rank))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, before[1]))
    try:
        whole, followed = list(merged(tmp_path)), list(follow(tmp_path, stop=lambda: True))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert len(whole) == 400 and whole == sorted(whole, key=lambda line: line[:26]) and followed == whole


def test_an_endless_line_is_followed_in_parts(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/rank_x.log").write_text("no rank's")
    with (tmp_path / "logs/rank_00000.log").open("wb") as file:
        file.truncate(5 << 20)
    lines = list(follow(tmp_path, stop=lambda: True))
    assert len(lines) == 5 and max(map(len, lines)) <= 1 << 20
    check_selection(tmp_path, LogSelection(rank=0))


def test_a_line_that_is_being_written_is_followed_when_it_is_whole(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    path, line = tmp_path / "logs/rank_00000.log", LINE.format(1, 0)
    path.write_text(line[:20])
    seen = follow(tmp_path, poll_seconds=0, stop=lambda: path.stat().st_size > len(line))
    with path.open("a") as file:
        file.write(line[20:] + line)
    assert list(seen) == [line.rstrip()] * 2


# ---- shards ----------------------------------------------------------------------------------------------


def header(name: str, size: int, kind: bytes = b"0") -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def tar_of(path: Path, *names: str, **options: object) -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, **options) as tar:  # type: ignore[call-overload]
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(SAMPLE)
            tar.addfile(info, BytesIO(SAMPLE))
    return path


def test_samples_behind_the_end_of_a_tar_are_not_lost_in_silence(tmp_path: Path) -> None:
    one, two = tar_of(tmp_path / "a.tar", "0.json"), tar_of(tmp_path / "b.tar", "1.json")
    (tmp_path / "ab.tar").write_bytes(one.read_bytes() + two.read_bytes())
    with pytest.raises(DataError, match="two tars one after the other"):
        index_shard(tmp_path / "ab.tar")
    with one.open("ab") as file:
        file.truncate((1 << 20) + 1024)
    assert list(index_shard(one).samples) == ["0"]
    with one.open("ab") as file:
        file.truncate(4 << 20)
    with pytest.raises(DataError, match="bytes follow"):
        index_shard(one)


@pytest.mark.parametrize("kind", [b"M", b"D", b"X", b"N", b"A", b"\xff"])
def test_members_that_cannot_be_read_are_not_lost_in_silence(kind: bytes, tmp_path: Path) -> None:
    member = SAMPLE + bytes(-len(SAMPLE) % 512)
    content = header("0.json", len(SAMPLE)) + member + header("1.json", len(SAMPLE), kind) + member
    (tmp_path / "a.tar").write_bytes(content + bytes(1024))
    with pytest.raises(TarDamageError, match=r"'1\.json' is of kind"):
        list(scan_tar(tmp_path / "a.tar"))


def test_no_header_names_all_members(tmp_path: Path) -> None:
    named = tar_of(tmp_path / "a.tar", "0.json", pax_headers={"path": "other.json"})
    with pytest.raises(TarDamageError, match="one name or size"):
        list(scan_tar(named))
    assert len(list(scan_tar(tar_of(tmp_path / "b.tar", "0.json", pax_headers={"comment": "x"})))) == 1


def test_names_may_hold_line_ends(tmp_path: Path) -> None:
    assert list(index_shard(tar_of(tmp_path / "a.tar", "d\nx/0.json", "1\n.json")).samples) == [
        "d\nx/0",
        "1\n",
    ]


def test_a_member_is_no_larger_than_it_may_be(tmp_path: Path) -> None:
    path, size = tmp_path / "a.tar", 40 << 30
    with path.open("wb") as file:
        file.write(header("0.json", size))
        file.seek(512 + size)
        file.write(header("1.json", len(SAMPLE)) + SAMPLE + bytes(-len(SAMPLE) % 512))
        file.write(header("1.png", MAX_BYTES["image"] + 1))
        file.truncate(file.tell() + MAX_BYTES["image"] + 512 + 1024)
    shards = ShardSet.open([str(path)])
    with pytest.raises(BadSampleError, match=f"has {size} bytes"):
        shards.read(shards.refs[0])
    with pytest.raises(BadSampleError, match=rf"\.png has {MAX_BYTES['image'] + 1} bytes"):
        shards.read_member(SampleRef("a", "1"), "png")
    assert shards.read(shards.refs[1]).answer == "4"


def test_patterns_look_at_no_more_names_than_they_may(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"d{number}").mkdir()
        (tmp_path / f"d{number}" / "self").symlink_to(tmp_path)
    began = time.monotonic()
    with pytest.raises(ValueError, match="too many names"):
        names_like(f"{tmp_path}{'/*/self' * 20}/*.tar", Budget(20_000))
    with pytest.raises(DataError, match="too many names"):
        expand_patterns([f"{tmp_path}{'/*/self' * 20}/*.tar"], budget=Budget(20_000))
    assert time.monotonic() - began < 30


def test_patterns_find_what_glob_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a/1.tar", "a/.2.tar", "b/1.tar", ".c/1.tar", "b/[x].tar"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    for pattern in (
        "*/*.tar",
        "a/.*",
        ".*/*",
        "[ab]/?.tar",
        "b/[[]x].tar",
        "*",
        "./*/1.tar",
        "**/1.tar",
        "a/*/",
        "x",
    ):
        for whole in (pattern, f"{tmp_path}/{pattern}"):
            expected = sorted({os.path.normpath(found) for found in glob.glob(whole)})
            assert sorted(map(os.path.normpath, names_like(whole, Budget()))) == expected, whole


def test_a_source_that_sends_nothing_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WDS_CACHE", str(tmp_path))
    monkeypatch.setattr(remote, "_SILENCE_SECONDS", 0.5)
    with pytest.raises(DataError, match="nothing has arrived"):
        remote.fetch("pipe:exec sleep 600")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [".lock"]


def test_shards_are_written_through_no_link_and_over_no_folder(tmp_path: Path) -> None:
    samples = [NewSample(prompt="2 + 2?", answer="4", verifier="math")]
    mine = tmp_path / "mine"
    mine.write_text("precious")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "lock").touch()
    (tmp_path / ".copd-unfinished-000000000000").symlink_to(elsewhere)
    (tmp_path / "x-000000.tar").symlink_to(mine)
    write_shards(samples, tmp_path, "x", overwrite=True)
    assert mine.read_text() == "precious" and (elsewhere / "lock").exists()
    assert len(index_shard(tmp_path / "x-000000.tar").samples) == 1
    (tmp_path / "y-000000.tar").mkdir()
    with pytest.raises(DataError, match=r"y-000000\.tar is in the place of a shard"):
        write_shards(samples, tmp_path, "y", overwrite=True)
    assert not list(tmp_path.glob(".y*"))


# ---- files that commands write and read ------------------------------------------------------------------


def test_outputs_replace_nothing_but_outputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "my.yaml"
    mine.write_text("run: {name: x}\n")
    (tmp_path / "run").mkdir()
    for command in (
        ["report", str(tmp_path / "run"), "--out", str(mine)],
        ["timeline", str(tmp_path / "run"), "--out", str(mine)],
    ):
        assert main(command) == 2
        assert f"{mine} is there already" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="is left alone"):
        write_machine(read_machine("cpu"), mine)
    assert mine.read_text() == "run: {name: x}\n"
    write_machine(read_machine("cpu"), tmp_path / "cpu.yaml")
    write_machine(read_machine("cpu"), tmp_path / "cpu.yaml")
    (tmp_path / "page.html").write_text("<!doctype html>\n")
    refuse_other(tmp_path / "page.html", b"<!doctype html>", "page")
    with pytest.raises(ConfigError, match="is no page"):
        refuse_other(tmp_path, b"<!doctype html>", "page")


def test_a_record_of_another_kind_is_not_replaced(tmp_path: Path) -> None:
    record, beside = tmp_path / "evaluation.json", tmp_path / "evaluation.md"

    def refuse() -> None:
        refuse_other_record(record, ("models", "means"), "result", beside=[beside])

    refuse()
    beside.write_text("my thoughts")
    with pytest.raises(ConfigError, match=r"evaluation\.md is there already and is no result"):
        refuse()
    record.write_text('{"models": {}, "means": {}, "more": 1}')
    refuse()
    for text in ('{"accuracy": {}}', "[]", "NaN", ""):
        record.write_text(text)
        with pytest.raises(ConfigError, match=r"evaluation\.json is there already and is no result"):
            refuse()


@pytest.mark.parametrize("name", ["moved.md", "moved.png", "moved.json"])
def test_a_report_of_distances_replaces_reports_alone(tmp_path: Path, name: str) -> None:
    refuse_other_report(tmp_path / "moved.json")
    (tmp_path / name).write_text("{}")
    with pytest.raises(ConfigError, match=r"merge: --report: .*moved\.\w+ is there already and is"):
        refuse_other_report(tmp_path / "moved.json")


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)


ODD_SCALARS = (
    *(f"!!{tag} {text}".encode() for tag in ("timestamp", "bool", "int", "float") for text in ("abc", '""')),
    b"2024-13-99",
    b"1:" + b"59:" * 30_000 + b"0.0",
    b"0x" + b"f" * 100_000,
)
"""What PyYAML fails on with errors of other kinds, or takes hours for."""


@pytest.mark.parametrize("scalar", ODD_SCALARS, ids=lambda scalar: scalar[:20].decode())
def test_a_value_of_a_merge_recipe_that_is_none_is_named(scalar: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_bytes(
        b"merge_method: linear\nmodels: [{model: a, parameters: {weight: " + scalar + b"}}]"
    )
    begun = time.monotonic()
    with pytest.raises(ConfigError, match=r"m\.yaml"):
        read_recipe(tmp_path / "m.yaml")
    (tmp_path / "config.yaml").write_bytes(b"branches: " + scalar)
    assert _configured_branches(tmp_path) == []
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize(
    "text",
    [
        b"\xff\xfe\x00",
        b"h100: [1, 2]",
        b"h100: {like: [a]}",
        b"h100: 3",
        BOMB.encode() + b"h100: *a11",
        b"[",
        *(b"h100: " + odd for odd in ODD_SCALARS),
    ],
)
def test_a_file_of_machines_that_is_none_is_named(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_bytes(text)
    with pytest.raises(ConfigError, match=r"m\.yaml"):
        read_machine("h100", tmp_path / "m.yaml")


@pytest.mark.parametrize(
    "text", [b'{"response": "4", "answer": "4", "verifier": "exact", "truncated": "false"}', b"\xff"]
)
def test_an_audit_takes_no_text_for_a_truth_value(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(text)
    with pytest.raises(DataError, match=r"a\.jsonl"):
        read_cases(tmp_path / "a.jsonl")


# ---- the rule --------------------------------------------------------------------------------------------

MAY_WRITE = {
    "checkpoint/distcp.py": "a folder that it has just made",
    "cli/output.py": "nowhere",
    "data/convert/write.py": "a folder that it has just made",
    "formats/hf.py": "a folder of its own, unfinished",
    "hf/companions.py": "a folder of its own, unfinished",
    "hf/planned_file.py": "a folder of its own, unfinished, and no link",
    "hf/template.py": "a folder of its own, unfinished",
    "metrics/phase_memory.py": "of the kernel",
    "planner/recorded.py": "a folder that it has just made",
    "reproduction/compare.py": "its own folder",
    "reproduction/figures.py": "its own folder",
    "reproduction/forked.py": "its own folder",
    "reproduction/measure.py": "its own folder",
    "reproduction/runner.py": "its own folder",
    "rewards/processes.py": "a folder that it has just made",
    "rewards/proofs/compiler.py": "a cache of its own",
    "rewards/sandbox/inside.py": "in the sandbox",
    "rewards/sandbox/memory.py": "of the kernel",
    "rewards/worker.py": "nowhere",
    "tiny/base.py": "a folder that it has just made",
    "tiny/tasks/encode.py": "memory",
    "untrusted/whole_file.py": "what it has just opened",
}
"""Modules that open files plainly for writing, and where these lie."""


def plain_writes(tree: ast.AST) -> Iterator[str]:
    """Calls that would write through a link, or wait for a FIFO's reader."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name not in ("open", "write_text", "write_bytes", "copyfile", "copy2"):
            continue
        text = ast.unparse(node)
        modes = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        modes += [
            str(k.value.value) for k in node.keywords if k.arg == "mode" and isinstance(k.value, ast.Constant)
        ]
        opens = any(mode[:1] in "wax" and set(mode) <= set("waxbt+") for mode in modes if mode)
        flags = text.startswith("os.open(") and ("O_WRONLY" in text or "O_RDWR" in text)
        if name != "open" or opens or flags:
            yield f"line {node.lineno}: {text}"


def test_the_rule_finds_plain_writes() -> None:
    bad = ["open(p, 'w')", "p.open('ab')", "p.open(mode='x')", "p.write_text(t)", "os.open(p, os.O_WRONLY)"]
    good = ["open(p)", "p.open('rb')", "write_whole(p, t)", "open_appending(p)", "Image.open(b)", "p.open()"]
    assert all(list(plain_writes(ast.parse(text))) for text in bad)
    assert not [text for text in good if list(plain_writes(ast.parse(text)))]


def test_what_others_may_have_made_is_not_written_through() -> None:
    package = ROOT / "copd_megatron"
    found = {
        str(path.relative_to(package)): writes
        for path in sorted(package.rglob("*.py"))
        if (writes := list(plain_writes(ast.parse(path.read_text(encoding="utf-8")))))
    }
    others = {name: writes for name, writes in found.items() if name not in MAY_WRITE}
    assert not others, f"use untrusted/whole_file.py: {others}"
    assert set(MAY_WRITE) <= set(found), f"no longer: {set(MAY_WRITE) - set(found)}"


@pytest.mark.parametrize("change", ["replaced", "written to", "longer", "shorter", "a FIFO", "gone"])
def test_a_shard_that_changes_gives_no_other_sample(tmp_path: Path, change: str) -> None:
    """Its index says where samples lie; in another file, other bytes lie there."""
    tar_of(tmp_path / "a.tar", "0.json", "1.json")
    shards = ShardSet.open([str(tmp_path / "a.tar")])
    ref = shards.refs[0]
    before, path = shards.read(ref), tmp_path / "a.tar"
    assert shards.read(ref) == before
    content = path.read_bytes().replace(b"2 + 2?", b"2 + 3?")
    if change == "replaced":
        (tmp_path / "new").write_bytes(content)
        os.replace(tmp_path / "new", path)
    elif change == "written to":
        path.write_bytes(content)
    elif change == "gone":
        path.unlink()
    elif change == "a FIFO":
        path.unlink()
        os.mkfifo(path)
    else:
        path.write_bytes(content + bytes(1024) if change == "longer" else content[:1024])
    message = {"gone": "cannot be read any more", "a FIFO": "is a FIFO"}
    with pytest.raises(
        DataError, match=rf"a\.tar: .*{message.get(change, 'changed or replaced while in use')}"
    ):
        shards.read(ref)
