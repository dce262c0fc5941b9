"""Files that the product wrote and reads back, with any field replaced: read, or refused by file and line."""

from __future__ import annotations

import gzip
import json
import os
import re
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from copd_megatron.checkpoint.compare import metrics_of
from copd_megatron.cli.main import main
from copd_megatron.config.models import check_tokenizer
from copd_megatron.data import encode_prompt
from copd_megatron.data.pass_rates import read_pass_rates
from copd_megatron.errors import CheckpointError, ConfigError, DataError
from copd_megatron.evaluation.summary import summarise
from copd_megatron.evaluation.verdicts import PromptVerdicts, VerdictFile
from copd_megatron.merge.journal import Journal
from copd_megatron.merge.merger import ShardOutcome
from copd_megatron.metrics.timeline import read_timelines
from copd_megatron.metrics.writers import JsonlWriter
from copd_megatron.report.history import read_run
from copd_megatron.report.merge_distance import DistanceReport, LayerDistance, read_distances
from copd_megatron.report.scores import score_table
from copd_megatron.samples.files import read_samples
from copd_megatron.samples.record import Kind, Sample, to_line
from copd_megatron.samples.show import shown
from copd_megatron.untrusted.json_text import MAX_NESTING, dumped, load, loadable, made
from tests.support.byte_tokenizer import byte_tokenizer

DEEP = "[" * 100_000 + "]" * 100_000
VALUES = {
    **{name: name for name in ("null", "true", "-1", "7", "0.5", "NaN", "-Infinity", "1e999", "[]", "{}")},
    "text": '"x"',
    "half a pair": '"\\udcff"',
    "huge": "9" * 400,
    "endless digits": "9" * 9000,
    "deep": DEEP,
    "list": "[1]",
    "object": '{"a": "b"}',
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A file, one good line of it, and what reads it as a whole command would."""

    path: str
    line: dict[str, Any]
    read: Callable[[Path], object]
    before: str = ""
    """Lines that stand before it."""


SAMPLE = Sample(
    **{"step": 1, "kind": Kind.cross, "model": "text", "edge": "text<-image", "domain": "image"},
    **{"prompt_id": "i/1", "occurrence": 0, "sample_index": 0, "prompt": "How many?", "gold": "3"},
    **{"verifier": "exact", "metadata": {"level": 1}, "media": [{"kind": "image"}], "response": "4"},
    **{"reward": 0.0, "seed": 1, "truncated": True, "num_prompt_tokens": 2, "num_response_tokens": 1},
    **{"weight_version": 1, "lengths": [1], "student": [-0.5], "teacher": [-4.0]},
)
VERDICTS = PromptVerdicts(
    **{"domain": "text", "prompt": "s/1", "verifier": "math", "metadata": {"level": 1}, "rewards": [1.0]},
    **{"answers": ["4"], "truncated": [False], "num_tokens": [3]},
)
DISTANCES = DistanceReport(
    base="base",
    branches=("a", "b"),
    layers=(LayerDistance(layer="0", num_elements=4, base_norm=1.0, moved=(0.5, 0.5), cosines=(0.1,)),),
)
HEADER = {
    **{"rank": 0, "branch": "text", "branch_rank": 0, "host": "h"},
    **{"unix_minus_monotonic": 5.0, "aligned_at": 1.0},
}
TABLE = {
    **{"domains": ["text"], "num_prompts": {"text": 4}},
    **{"accuracy": {"base": {"text": 0.5}}, "mean_reward": {"base": {"text": 0.25}}},
}


def verdicts(folder: Path) -> VerdictFile:
    return VerdictFile(folder, "m", {})


def show_samples(folder: Path) -> None:
    for sample in read_samples(folder):
        to_line(sample)
        assert list(shown(sample))


def show_run(folder: Path) -> None:
    history = read_run(folder)
    score_table([history])


CASES = {
    "verdicts": Case(
        path=str(verdicts(Path()).folder / "verdicts.jsonl"),
        line=asdict(VERDICTS),
        read=lambda folder: summarise({"m": verdicts(folder).read()}),
    ),
    "samples": Case(
        path="samples/text/train-000001.jsonl.gz", line=json.loads(to_line(SAMPLE)), read=show_samples
    ),
    "metrics": Case(path="metrics.jsonl", line={"step": 1, "phase": "opd", "a/x": 0.5}, read=show_run),
    "resumed metrics": Case(
        path="metrics.jsonl",
        line={"step": 1, "phase": "opd"},
        read=lambda folder: JsonlWriter(folder / "metrics.jsonl").truncate_after(3),
    ),
    "compared metrics": Case(path="metrics.jsonl", line={"step": 1, "a/x": 0.5}, read=metrics_of),
    "header": Case(path="timeline/rank_00000.jsonl", line=HEADER, read=read_timelines),
    "operation": Case(
        path="timeline/rank_00000.jsonl",
        line={"path": "a > b", "begin": 1.0, "end": 2.0},
        read=read_timelines,
        before=json.dumps(HEADER) + "\n",
    ),
    "step": Case(
        path="timeline/rank_00000.jsonl",
        line={"step": 1, "phase": "opd", "begin": 1.0, "end": 2.0},
        read=read_timelines,
        before=json.dumps(HEADER) + "\n",
    ),
    "distances": Case(
        path="distances.json",
        line=json.loads(DISTANCES.to_json()),
        read=lambda folder: read_distances(folder / "distances.json").rows(),
    ),
    "table": Case(path="evaluation.json", line=TABLE, read=show_run, before=""),
    "settings of rates": Case(
        path="rates.jsonl",
        line={"settings": {"num_samples": 2, "seed": 1}},
        read=lambda folder: read_pass_rates(folder / "rates.jsonl").num_samples,
    ),
    "rate": Case(
        path="rates.jsonl",
        line={"prompt": "s/1", "num_correct": 1, "num_samples": 2},
        read=lambda folder: read_pass_rates(folder / "rates.jsonl"),
        before='{"settings": {"num_samples": 2}}\n',
    ),
}


def put(folder: Path, case: Case, line: str) -> Path:
    path = folder / case.path
    path.parent.mkdir(parents=True, exist_ok=True)
    content = (case.before + line + "\n").encode("utf-8", "surrogatepass")
    path.write_bytes(gzip.compress(content, 1) if path.suffix == ".gz" else content)
    if case.path == "evaluation.json":
        (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    return path


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value, itself included."""
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*at, key))


def replaced(value: Any, at: tuple[Any, ...], by: str) -> str:
    """The JSON text of a value that has another text at one place."""
    mark = "@here@"
    if not at:
        return by
    copy = json.loads(json.dumps(value))
    inner = copy
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = mark
    return json.dumps(copy).replace(f'"{mark}"', by)


@pytest.mark.parametrize("name", CASES)
def test_any_field_may_hold_anything(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    case.read(put(tmp_path, case, json.dumps(case.line)) and tmp_path)
    refused = 0
    for at in places(case.line):
        for value in VALUES.values():
            path = put(tmp_path, case, replaced(case.line, at, value))
            try:
                case.read(tmp_path)
            except DataError as error:
                assert path.name in str(error) and "\x1b" not in str(error) and len(str(error)) < 600, error
                refused += 1
    assert refused > len(case.line)


@pytest.mark.parametrize("name", CASES)
def test_any_field_may_be_missing(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    for key in case.line:
        put(tmp_path, case, json.dumps({k: v for k, v in case.line.items() if k != key}))
        try:
            case.read(tmp_path)
        except DataError as error:
            assert Path(case.path).name in str(error)


@pytest.mark.parametrize("value", ["deep", "NaN", "list", "huge", "half a pair"])
def test_the_commands_end_with_a_sentence(
    value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = CASES["samples"]
    for field in ("reward", "prompt", "lengths", "kind"):
        put(tmp_path, case, replaced(case.line, (field,), VALUES[value]))
        for options in ([], ["--json"]):
            status = main(["samples", str(tmp_path), *options])
            told = capsys.readouterr()
            assert status in (0, 2) and "Traceback" not in told.err, told.err
            assert (status == 2) == told.err.startswith("copd: "), told.err


def test_what_ends_inside_its_compression_is_named(tmp_path: Path) -> None:
    path = put(tmp_path, CASES["samples"], to_line(SAMPLE))
    whole = path.read_bytes()
    for damaged in (
        *(whole[:length] for length in range(0, len(whole), 7)),
        *(whole[:place] + b"\xff\xff\xff" + whole[place + 3 :] for place in range(0, len(whole), 5)),
    ):
        path.write_bytes(damaged)
        try:
            list(read_samples(tmp_path))
        except DataError as error:
            assert "train-000001.jsonl.gz" in str(error)


def test_a_bomb_costs_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "samples/text/train-000001.jsonl.gz"
    path.parent.mkdir(parents=True)
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(256):
            file.write(bytes(1 << 20))
    assert path.stat().st_size < 2 << 20
    tracemalloc.start()
    with pytest.raises(DataError, match=r"train-000001.*longer than"):
        list(read_samples(tmp_path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200 << 20


def test_a_fifo_in_a_files_place_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / CASES["samples"].path
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    with pytest.raises(DataError, match="a FIFO"):
        list(read_samples(tmp_path))


@pytest.mark.parametrize("value", VALUES)
def test_a_damaged_journal_is_no_journal(value: str, tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.begin("f")
    journal.finish(0, ShardOutcome(digest="d", equals=(1,)))
    assert journal.fingerprint() == "f" and journal.finished(0) == ShardOutcome(digest="d", equals=(1,))
    for text in (VALUES[value], f'{{"digest": "d", "equals": {VALUES[value]}}}'):
        (tmp_path / ".merge" / "shard-00000.json").write_text(text)
        found = journal.finished(0)
        assert found is None or all(type(number) is int for number in found.equals)


def test_json_is_read_strictly() -> None:
    assert load('{"a": [1, -2.5, "x", null, true]}') == {"a": [1, -2.5, "x", None, True]}
    assert load(b'"\xed\xb3\xbf"') == "\udcff"
    assert load("[" * MAX_NESTING + "]" * MAX_NESTING)
    for text in ("[" * (MAX_NESTING + 1) + "]" * (MAX_NESTING + 1), DEEP, "NaN", "1e999", "9" * 400, b"\xff"):
        with pytest.raises(ValueError):
            load(text)
    assert loadable({"a": (float("nan"), 10**400, 1.5)}) == {"a": [None, None, 1.5]}
    assert load(dumped({"a": (float("inf"), -1e200, 1.5)})) == {"a": [None, None, 1.5]}


def test_a_dataclass_is_made_of_its_types_alone() -> None:
    assert made(ShardOutcome, {"digest": "d", "equals": [1]}).equals == (1,)
    for record, told in (
        ({"digest": "d"}, "'equals' is missing"),
        ({"digest": 1, "equals": []}, "digest is a number"),
        ({"digest": "d", "equals": [True]}, r"equals\[0\] is a truth value"),
        ({"digest": "d", "equals": [], "more": 1}, "unknown field 'more'"),
    ):
        with pytest.raises(ValueError, match=told):
            made(ShardOutcome, record)


def test_checkpoints_are_errors_of_checkpoints(tmp_path: Path) -> None:
    from copd_megatron.checkpoint.manifest import MANIFEST, read_manifest

    for value in VALUES.values():
        (tmp_path / MANIFEST).write_text(f'{{"format": 1, "sha256": "", "manifest": {value}}}')
        with pytest.raises(CheckpointError, match=MANIFEST):
            read_manifest(tmp_path)


# ---- tokenizers of a received model ----------------------------------------------------------------------


def _changed(name: str, **changes: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / name
        found = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(found | changes))

    return change


def _with_id(number: int) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "tokenizer.json"
        found = json.loads(path.read_text())
        found["model"]["vocab"]["zz"] = number
        path.write_text(json.dumps(found))

    return change


def _holding(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


LONGER = {"type": "Replace", "pattern": {"Regex": "."}, "content": "a" * 32}
SEEN_IN_FILES: dict[str, Callable[[Path], object]] = {
    "no json": _holding("tokenizer.json", "{"),
    "deep": _holding("tokenizer.json", "[" * 10**5 + "]" * 10**5),
    "id of 2^40": _with_id(2**40),
    "id of 2^32 - 2": _with_id(2**32 - 2),
    "negative id": _with_id(-1),
    "a million times longer": _changed(
        "tokenizer.json", normalizer={"type": "Sequence", "normalizers": [LONGER] * 4}
    ),
    "settings are a list": _holding("tokenizer_config.json", "[1]"),
    "settings are no json": _holding("tokenizer_config.json", "{"),
    "special tokens are a list": _holding("special_tokens_map.json", "[1]"),
}
SEEN_WHEN_LOADED: dict[str, Callable[[Path], object]] = {
    "empty": _holding("tokenizer.json", "{}"),
    "class": _changed("tokenizer_config.json", tokenizer_class=5),
    "token": _changed("tokenizer_config.json", eos_token={"a": [1]}),
}


@pytest.mark.parametrize("what", [*SEEN_IN_FILES, *SEEN_WHEN_LOADED])
def test_a_tokenizer_that_cannot_be_loaded_is_named(what: str, tmp_path: Path) -> None:
    """Before it takes all memory or ends the process, and at the dry run where files say so."""
    from copd_megatron.data.model_files import load_tokenizer

    byte_tokenizer().save_pretrained(tmp_path)
    check_tokenizer(tmp_path)
    {**SEEN_IN_FILES, **SEEN_WHEN_LOADED}[what](tmp_path)
    if what in SEEN_IN_FILES:
        with pytest.raises(ConfigError, match=re.escape(str(tmp_path))):
            check_tokenizer(tmp_path)
    with pytest.raises((ConfigError, DataError), match=rf"{re.escape(str(tmp_path))}.*opy"):
        load_tokenizer(tmp_path)


def test_a_chat_template_that_takes_all_memory_is_named() -> None:
    tokenizer = byte_tokenizer(chat_template="{{ 'a' * 10 ** 18 }}")
    with pytest.raises(DataError, match=r"chat template .* memory"):
        encode_prompt(tokenizer, "hi")


def test_a_chat_template_that_does_not_end_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten billion turns of a loop, which nothing else would end."""
    from copd_megatron.data import model_files
    from copd_megatron.data.model_files import load_tokenizer

    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}x"
    byte_tokenizer(chat_template=loop).save_pretrained(tmp_path)
    monkeypatch.setattr(model_files, "_LIMIT_SECONDS", 0.5)
    with pytest.raises(DataError, match=rf"{re.escape(str(tmp_path))}: the chat template has not ended"):
        load_tokenizer(tmp_path)
    for refusing in ("{{ raise_exception('no') }}", "{% for %}", "{{ messages[7].role }}"):
        byte_tokenizer(chat_template=refusing).save_pretrained(tmp_path)
        assert load_tokenizer(tmp_path).chat_template == refusing
