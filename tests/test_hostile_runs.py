"""Received run directories and checkpoints: nothing in them runs, hangs a reader, writes outside of them, or
puts the reader's own files on a page."""

from __future__ import annotations

import ast
import gzip
import json
import os
import signal
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

import braceexpand
import pytest
from _pytest.mark.structures import ParameterSet
from hypothesis import given
from hypothesis import strategies as st

from copd_megatron.checkpoint.manifest import hash_file
from copd_megatron.cli.main import main
from copd_megatron.config import load_config
from copd_megatron.data.braces import MAX_ALTERNATIVES, alternatives, count
from copd_megatron.data.convert.jsonl import FieldMap, convert_jsonl
from copd_megatron.data.convert.rows import read_rows
from copd_megatron.data.pass_rates import read_pass_rates
from copd_megatron.data.shards import expand_patterns, index_shard, names_remote
from copd_megatron.errors import ConfigError, DataError
from copd_megatron.evaluation.table import save_table
from copd_megatron.evaluation.verdicts import VerdictFile
from copd_megatron.hf.companions import read_json
from copd_megatron.hf.digest import model_digest
from copd_megatron.launch.provenance import read_starts, record_start
from copd_megatron.merge.recipe import read_recipe
from copd_megatron.metrics.rank_log import Selection, check_selection, follow, merged
from copd_megatron.metrics.timeline import read_timelines, write_trace
from copd_megatron.metrics.writers import JsonlWriter
from copd_megatron.planner.machine import read_machine
from copd_megatron.report.history import MAX_NAMES, MAX_SHOWN, read_run
from copd_megatron.report.merge_distance import read_distances
from copd_megatron.report.names import figure_text
from copd_megatron.report.panels import panels
from copd_megatron.samples.files import read_samples
from copd_megatron.samples.record import to_line
from copd_megatron.untrusted.regular_file import open_regular
from copd_megatron.untrusted.whole_file import open_appending, replacing, write_whole
from tests.test_hostile_files import DISTANCES, HEADER, SAMPLE
from tests.test_report import write_run

ROOT = Path(__file__).resolve().parents[1]
SECRET = "-----BEGIN PRIVATE KEY-----"
CONFIG = "run: {name: x}\nmodel: {path: base}\nbranches: {text: {data: {train: [%s]}}}\n"


def with_samples(folder: Path, **changed: object) -> Path:
    path = folder / "samples/text/train-000001.jsonl.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress((json.dumps(json.loads(to_line(SAMPLE)) | changed) + "\n").encode()))
    return folder


def received(folder: Path) -> Path:
    """A run directory with something of everything that a report reads."""
    with_samples(write_run(folder))
    (folder / "config.yaml").write_text(CONFIG % "a.tar")
    return folder


@pytest.fixture
def in_time() -> Iterator[None]:
    """What hangs is interrupted."""

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# ---- nothing runs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern", ["pipe:touch {}", "{{pipe:touch {},y}}", "{{{{pipe:,x}}touch {},y}}", "pi{{pe:touch {},y}}"]
)
def test_a_report_runs_no_command_of_the_settings(pattern: str, tmp_path: Path) -> None:
    run, mark = received(tmp_path / "run"), tmp_path / "ran"
    named = pattern.format(mark)
    (run / "config.yaml").write_text(CONFIG % json.dumps(named))
    assert main(["report", str(run)]) == 0
    assert not mark.exists()
    assert names_remote(named)
    with pytest.raises(DataError, match="no shard matches"):
        expand_patterns([named, "absent.tar"], local_only=True)
    assert not mark.exists()


# ---- nothing outside is written --------------------------------------------------------------------------

WRITERS: dict[str, tuple[tuple[str, ...], Callable[[Path], object]]] = {
    "report": (
        ("report.html", "report.png", "report.html.partial"),
        lambda run: main(["report", str(run)]),
    ),
    "timeline": (("timeline/trace.json",), write_trace),
    "distances": (("d.md", "d.json", "d.png"), lambda run: DISTANCES.write(run / "d")),
    "table": (
        ("evaluation.txt", "evaluation.md", "evaluation.json"),
        lambda run: save_table(run, {"base": {"text": 0.5}}, ["text"]),
    ),
    "start": (
        ("config.yaml", "config.yaml.partial", "starts.jsonl.partial"),
        lambda run: record_start(load_config(run.with_suffix(".yaml")), run, ["train"]),
    ),
    "settings of verdicts": (
        tuple(f"{VerdictFile(Path(), 'm', {}).folder}/{name}" for name in ("settings.json",)),
        lambda run: VerdictFile(run, "m", {}).begin(anew=True),
    ),
    "shorter metrics": (
        ("metrics.jsonl.tmp",),
        lambda run: JsonlWriter(run / "metrics.jsonl").truncate_after(1),
    ),
}


@pytest.mark.parametrize("what", WRITERS)
def test_links_are_not_written_through(what: str, tmp_path: Path) -> None:
    run, mine = write_run(tmp_path / "run"), tmp_path / "mine"
    run.with_suffix(".yaml").write_text("run: {name: x}\nmodel: {path: base}\n")
    (run / "timeline").mkdir()
    (run / "timeline/rank_00000.jsonl").write_text(json.dumps(HEADER) + "\n")
    mine.write_text("precious")
    names, write = WRITERS[what]
    for name in names:
        path = run / name
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(mine)
    write(run)
    assert mine.read_text() == "precious"
    made = [name for name in names if not name.endswith((".partial", ".tmp"))]
    assert all((run / name).is_file() and not (run / name).is_symlink() for name in made)
    assert not any(run.rglob(".*.partial"))


def test_what_is_appended_to_is_no_link(tmp_path: Path) -> None:
    mine, link = tmp_path / "mine", tmp_path / "metrics.jsonl"
    mine.write_text("{}\n")
    link.symlink_to(mine)
    for append in (open_appending, JsonlWriter):
        with pytest.raises(OSError, match="is a link"):
            append(link)
    assert mine.read_text() == "{}\n"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    write_whole(path, "old")
    path.chmod(0o600)
    with pytest.raises(RuntimeError), replacing(path) as file:
        file.write(b"half of the new")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    write_whole(path, b"new", durable=True)
    assert path.read_text() == "new" and path.stat().st_mode & 0o777 == 0o600
    os.mkfifo(tmp_path / "fifo")
    for taken in (tmp_path, tmp_path / "fifo", Path("/dev/null")):
        with pytest.raises(OSError, match="is no regular file"):
            write_whole(taken, "x")


# ---- nothing private is shown ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["config.yaml", "evaluation.txt", "starts.jsonl", "metrics.jsonl", "evaluation.json", "distances.json"],
)
def test_links_to_the_readers_files_are_not_shown(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, mine = received(tmp_path / "run"), tmp_path / "id_rsa"
    mine.write_text(SECRET)
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(mine)
    assert main(["report", str(run)]) == 2
    told = capsys.readouterr()
    assert "link out of" in told.err and name in told.err and SECRET not in told.out + told.err
    page = run / "report.html"
    assert not page.exists() or SECRET not in page.read_text()


def test_samples_are_not_read_through_links(tmp_path: Path) -> None:
    with_samples(tmp_path / "mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/samples").symlink_to(tmp_path / "mine/samples")
    with pytest.raises(DataError, match="link out of"):
        list(read_samples(tmp_path / "run"))


def test_links_within_a_folder_are_followed(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "circle").symlink_to("circle")
    with open_regular(tmp_path / "b", inside=tmp_path) as file:
        assert file.read() == b"x"
    with pytest.raises(OSError):
        open_regular(tmp_path / "circle", inside=tmp_path)


# ---- nothing hangs ---------------------------------------------------------------------------------------

READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "starts": ("starts.jsonl", read_starts),
    "settings": ("config.yaml", lambda run: load_config(run / "config.yaml")),
    "logs": ("logs/rank_00000.log", lambda run: list(merged(run))),
    "followed logs": ("logs/rank_00000.log", lambda run: list(follow(run, stop=lambda: True))),
    "branch of a log": ("logs/rank_00000.log", lambda run: check_selection(run, Selection(branch="a"))),
    "distances": ("distances.json", lambda run: read_distances(run / "distances.json")),
    "metrics": ("metrics.jsonl", lambda run: JsonlWriter(run / "metrics.jsonl")),
    "timeline": ("timeline/rank_00000.jsonl", read_timelines),
    "rates": ("rates.jsonl", lambda run: read_pass_rates(run / "rates.jsonl")),
    "shard": ("a.tar", lambda run: index_shard(run / "a.tar")),
    "a file of a checkpoint": ("x", lambda run: hash_file(run / "x")),
    "index of a checkpoint": (".metadata", lambda run: load_index(run)),
    "machines": ("cpu.yaml", lambda run: read_machine("cpu", run / "cpu.yaml")),
    "rows": ("rows.json", lambda run: list(read_rows([run / "rows.json"]))),
    "lines of rows": ("rows.jsonl", lambda run: list(read_rows([run / "rows.jsonl"]))),
    "table": ("rows.tsv", lambda run: list(read_rows([run / "rows.tsv"]))),
    "parquet": ("rows.parquet", lambda run: list(read_rows([run / "rows.parquet"]))),
    "own lines": ("mine.jsonl", lambda run: convert_jsonl([run / "mine.jsonl"], run, "mine", FieldMap())),
    "recipe": ("merge.yaml", lambda run: read_recipe(run / "merge.yaml")),
    "verdicts": (
        f"{VerdictFile(Path(), 'm', {}).folder}/verdicts.jsonl",
        lambda run: VerdictFile(run, "m", {}).begin(anew=False),
    ),
}


def load_index(folder: Path) -> object:
    from copd_megatron.checkpoint.safe_pickle import load_metadata

    return load_metadata(folder / ".metadata")


@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize("what", READERS)
def test_a_fifo_is_refused_at_once(what: str, tmp_path: Path) -> None:
    name, read = READERS[what]
    (tmp_path / name).parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / name)
    began = time.monotonic()
    with pytest.raises((OSError, ConfigError, DataError)) as refusal:
        read(tmp_path)
    assert Path(name).name in str(refusal.value)
    assert (
        "regular file" in str(refusal.value) or "no such" in str(refusal.value).lower() or refusal.value.args
    )
    assert time.monotonic() - began < 30


@pytest.mark.usefixtures("in_time")
def test_fifos_of_a_model_folder_are_no_files_of_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    assert read_json(tmp_path, "config.json") is None
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises((OSError, ValueError)):
        model_digest(tmp_path)


MAY_WAIT = {
    "metrics/phase_memory.py": "of the kernel",
    "samples/audit.py": "a file that the command names, maybe a pipe",
    "evaluation/paper.py": "of the product",
    "plugins.py": "of the product",
    "tiny/recipe.py": "of the product",
    "tiny/vl_recipe.py": "of the product",
    "data/convert/write.py": "a folder that it has just made",
    "launch/cause.py": "of the kernel",
    "launch/doctor.py": "of the kernel",
    "launch/shared_memory.py": "of the kernel",
    "reproduction/figures.py": "results in the product's own form",
    "planner/recorded.py": "a file that the command names",
    "planner/measure.py": "of the kernel",
    "branch/checkpoints.py": "a file that this process writes",
    "untrusted/whole_file.py": "a folder",
    "rewards/fork_server.py": "of the kernel",
    "rewards/processes.py": "a file that this process made",
    "rewards/proofs/compiler.py": "a cache of its own",
    "rewards/sandbox/bubblewrap.py": "of the product",
    "rewards/sandbox/inside.py": "what the sandbox is given",
    "rewards/sandbox/memory.py": "of the kernel",
    "rewards/sandbox/run.py": "of the kernel",
}
"""Modules that open files plainly, and whose they are."""


def plain_reads(tree: ast.AST) -> Iterator[str]:
    """Calls that open a file for reading and would wait for a FIFO's writer."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        text, first = ast.unparse(node), node.args[0] if node.args else None
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        reads = {
            "read_text": isinstance(node.func, ast.Attribute),
            "read_bytes": first is None,
            "open": (
                (isinstance(node.func, ast.Name) and "'w" not in text and "'a" not in text)
                or (isinstance(node.func, ast.Attribute) and first is None)
                or (isinstance(first, ast.Constant) and str(first.value).startswith("r"))
                or (text.startswith("os.open") and "O_RDONLY" in text and "O_NONBLOCK" not in text)
            ),
        }
        if reads.get(name, False):
            yield f"line {node.lineno}: {text}"


def test_the_rule_finds_plain_reads() -> None:
    bad = [
        "open(p)",
        "open(p, 'rb')",
        "p.open()",
        "p.open('r+b')",
        "p.read_text()",
        "os.open(p, os.O_RDONLY)",
    ]
    good = [
        "open(p, 'w')",
        "p.open('ab')",
        "open_regular(p)",
        "ShardSet.open(x)",
        "gzip.open(f)",
        "read_bytes(p, m)",
    ]
    assert all(list(plain_reads(ast.parse(text))) for text in bad)
    assert not [text for text in good if list(plain_reads(ast.parse(text)))]


def test_what_others_may_have_made_is_opened_without_waiting() -> None:
    package = ROOT / "copd_megatron"
    found = {
        name: reads
        for path in sorted(package.rglob("*.py"))
        if (reads := list(plain_reads(ast.parse(path.read_text(encoding="utf-8")))))
        for name in [str(path.relative_to(package))]
    }
    others = {name: reads for name, reads in found.items() if name not in MAY_WAIT}
    assert not others, f"use untrusted/regular_file.py: {others}"
    assert set(MAY_WAIT) <= set(found), "a module of the list opens nothing any more"


# ---- nothing grows ---------------------------------------------------------------------------------------

PATTERNS = st.text(st.sampled_from("{},.01a9-b\\"), max_size=24)


@given(PATTERNS)
def test_names_are_counted_as_they_are_expanded(pattern: str) -> None:
    try:
        number = count(pattern)
    except ValueError:
        return
    if number <= 5000:
        assert len(list(braceexpand.braceexpand(pattern))) == number, pattern


@pytest.mark.parametrize(
    "pattern",
    [
        "{0..3000000}.tar",
        "{0..9}" * 20,
        "{" + "{0..9}" * 20 + ",x}",
        "{0.." + "9" * 5000 + "}",
        "{0" + "0" * 50_000 + "..3}",
        "{" * 5000 + "a,b" + "}" * 5000,
        "{a,b}" * 20_000,
    ],
    ids=["range", "product", "inner product", "digits", "padding", "nesting", "long"],
)
def test_a_short_pattern_for_many_names_is_refused_at_once(pattern: str, tmp_path: Path) -> None:
    run = received(tmp_path / "run")
    (run / "config.yaml").write_text(CONFIG % json.dumps(pattern))
    began = time.process_time()
    tracemalloc.start()
    with pytest.raises(DataError, match="shard pattern") as refusal:
        expand_patterns([pattern])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 << 20 and len(str(refusal.value)) < 600
    assert time.process_time() - began < 5


def test_many_patterns_are_no_way_around(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.touch()
    assert len(list(alternatives(f"{{1..{MAX_ALTERNATIVES}}}"))) == MAX_ALTERNATIVES
    with pytest.raises(DataError, match="more than"):
        expand_patterns([str(path)[:-1] + "{" + "r," * 999 + "r}"] * 101)


def test_history_grows_with_its_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": i, "phase": "rlvr", f"m{i}/train/reward": 0.5}) for i in range(1, 8001)]
    path.write_text("\n".join(lines) + "\n")
    began = time.process_time()
    tracemalloc.start()
    run = read_run(tmp_path)
    shown = panels([run])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(run.series) == 8000 and run.series["m7/train/reward"][6:8] == pytest.approx(
        (0.5, float("nan")), nan_ok=True
    )
    assert [len(panel.curves) for panel in shown] == [MAX_SHOWN]
    assert peak < 150 << 20 and time.process_time() - began < 20, (peak, time.process_time() - began)
    path.write_text(json.dumps({"step": 1} | {f"m{i}": 1.0 for i in range(MAX_NAMES + 1)}))
    with pytest.raises(DataError, match=r"metrics\.jsonl.*more than"):
        read_run(tmp_path)


# ---- nothing breaks --------------------------------------------------------------------------------------

NAMES = ["$x$", "te$\\foo{$xt", "_hidden", "\udcff"]
MORE_NAMES = ["$\\frac$ $", "a\nb", "x" * 5000, "\x1b[2J", "\\$", "%s{}"]
NUMBERS = ["1e100", "1" + "0" * 300]
MORE_NUMBERS = ["1e308", "-1e308", "-1e100", "1e99", "-1", "0.5", "1e-300"]


def and_slowly(few: Sequence[str], more: Sequence[str]) -> Sequence[ParameterSet]:
    """Cases of every run of the tests, and those of the long one."""
    slow = pytest.mark.slow
    return [
        *(pytest.param(value, id=f"{place}") for place, value in enumerate(few)),
        *(pytest.param(value, id=f"more-{place}", marks=slow) for place, value in enumerate(more)),
    ]


@pytest.mark.parametrize("name", and_slowly(NAMES, MORE_NAMES))
def test_any_name_can_be_drawn(name: str, tmp_path: Path) -> None:
    name = name[:400]
    folder = tmp_path / (name.encode("utf-8", "replace").decode().replace("/", "")[:60])
    run = write_run(
        folder, extra={f"{name}/train/reward": [0.5] * 20, f"copd/teacher_gap/{name}": [0.1] * 20}
    )
    accuracy = {"base": {name: 0.5}, name: {name: 0.25}}
    table = {"domains": [name], "num_prompts": {name: 4}, "accuracy": accuracy}
    (run / "evaluation.json").write_text(json.dumps(table))
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    shown = figure_text(name).replace(r"\$", "$").strip()
    assert len(shown) <= 60 and (run / "report.png").stat().st_size > 10_000
    if shown.isascii() and not set(shown) & set("<>&\\%"):
        assert page.count(shown) > 3, shown


@pytest.mark.parametrize("number", and_slowly(NUMBERS, MORE_NUMBERS))
def test_any_number_is_shown_or_refused(
    number: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"step": 1, "text/train/reward": 0.5}, {"step": 2, "text/train/reward": 7777}]
    kinds = ["text/train/reward", "text/train/grad_norm", "text/timing/step_seconds", "copd/sym_kl/a-b"]
    sample = json.loads(to_line(SAMPLE))
    table = {"domains": ["t"], "num_prompts": {"t": 4}, "accuracy": {"base": {"t": 0.5}}}
    cases: list[tuple[str, str]] = [
        *(("metrics", json.dumps(lines[0]) + "\n" + json.dumps({"step": 2, kind: 7777})) for kind in kinds),
        ("metrics", json.dumps({"step": 7777, "text/train/reward": 0.5})),
        ("table", json.dumps(table | {"num_prompts": {"t": 7777}})),
        ("sample", json.dumps(sample | {"student": [7777]})),
        ("sample", json.dumps(sample | {"reward": 7777, "teacher": [7777]})),
    ]
    for place, (kind, text) in enumerate(cases):
        run = write_run(tmp_path / str(place), num_steps=3)
        text = text.replace("7777", number)
        if kind == "sample":
            with_samples(run)
            path = run / "samples/text/train-000001.jsonl.gz"
            path.write_bytes(gzip.compress(text.encode() + b"\n"))
        else:
            (run / {"metrics": "metrics.jsonl", "table": "evaluation.json"}[kind]).write_text(text + "\n")
        status = main(["report", str(run)])
        told = capsys.readouterr()
        assert status in (0, 2) and "Traceback" not in told.err, (text, told.err)
        assert status == 0 or str(run) in told.err, told.err


@pytest.mark.parametrize("text", ["", '{"rank": 0'])
def test_a_timeline_without_a_line_says_so(text: str, tmp_path: Path) -> None:
    (tmp_path / "timeline").mkdir()
    (tmp_path / "timeline/rank_00000.jsonl").write_text(text)
    with pytest.raises(DataError, match="no rank has written"):
        read_timelines(tmp_path)
