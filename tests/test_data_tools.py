"""The tools that write shards: same bytes for the same seed, disjoint splits, errors that help."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import resource
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from copd_megatron.cli.main import main
from copd_megatron.data import DataError, Sample, check_shards
from copd_megatron.data.convert.jsonl import FieldMap, convert_jsonl
from copd_megatron.data.convert.public import Conversion, convert_public
from copd_megatron.data.convert.staging import Staging
from copd_megatron.data.convert.write import WrittenDomain, _TarWriter, write_sets
from copd_megatron.rewards import registry
from copd_megatron.tiny.tasks.text import Family, write_domain
from tests.support.commands import run_script
from tests.support.hostile_media import BAD_JSON
from tests.support.shards import new_sample

TWO_TERMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}


def samples_of(paths: list[Path]) -> list[Sample]:
    shards = check_shards([str(path) for path in paths])
    return [shards.read(ref) for ref in shards.refs]


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def make(out: Path, *families: Family, **changes: Any) -> WrittenDomain:
    settings: dict[str, Any] = {"num_train": 60, "num_validation": 20, "seed": 1, "shard_size": 25}
    return write_domain(out, "toy", families, **{**settings, **changes})


# ---------------------------------------------------------------- make_text_data


def test_splits_are_disjoint_distinct_and_gradable(tmp_path: Path) -> None:
    written = make(
        tmp_path,
        Family(name="chain_sum", settings=TWO_TERMS, weight=3),
        Family(name="spell_backward", settings={"max_word_len": 6}),
        Family(name="countdown"),
    )
    assert [path.name for path in written.train] == [f"toy-train-{i:06d}.tar" for i in range(3)]
    train, validation = samples_of(written.train), samples_of(written.validation)
    assert (len(train), len(validation)) == (60, 20) == (written.num_train, written.num_validation)
    prompts = [sample.prompt for sample in train + validation]
    assert len(set(prompts)) == 80
    assert Counter(sample.metadata["dataset"] for sample in train) == {
        "chain_sum": 36,
        "spell_backward": 12,
        "countdown": 12,
    }
    assert len({sample.metadata["dataset"] for sample in train[:15]}) > 1  # mixed, not one after the other
    by_family = {sample.metadata["dataset"]: sample.verifier for sample in train}
    assert by_family["chain_sum"] == "numeric" and by_family["countdown"] == "reasoning_gym"
    for sample in train + validation:
        verify = registry.get(sample.verifier).verify
        assert verify(f"I think.\nAnswer: {sample.answer}", sample.answer, sample.metadata) == 1.0
        assert verify("Answer: certainly not this", sample.answer, sample.metadata) == 0.0


def test_seeds_decide_the_tasks(tmp_path: Path) -> None:
    family = Family(name="chain_sum", settings={"min_terms": 4, "max_terms": 5, "min_digits": 4})
    prompts = [
        {sample.prompt for sample in samples_of(make(tmp_path / str(seed), family, seed=seed).train)}
        for seed in (1, 2)
    ]
    assert not prompts[0] & prompts[1]


def test_template_suffix_and_chosen_verifier(tmp_path: Path) -> None:
    family = Family(name="chain_sum", settings=TWO_TERMS, verifier="exact")
    written = make(tmp_path, family, template="Task: {question}", prompt_suffix=" Number only.")
    for sample in samples_of(written.train):
        assert isinstance(sample.prompt, str)
        assert sample.prompt.startswith("Task: ") and sample.prompt.endswith(" Number only.")
        assert sample.verifier == "exact"


@pytest.mark.parametrize(
    ("families", "changes", "message"),
    [
        ([Family(name="chain_summ")], {}, r"no family 'chain_summ'.*Did you mean chain_sum"),
        ([Family(name="chain_sum", settings={"min_term": 2})], {}, r"no setting 'min_term'.*'min_terms'"),
        ([Family(name="chain_sum", settings={"seed": 2})], {}, "no setting 'seed'"),
        ([Family(name="chain_sum", settings={"min_terms": -1})], {}, "refuses the settings.*-1"),
        (
            [Family(name="chain_sum", settings={**TWO_TERMS, "max_digits": 1})],
            {"num_train": 900},
            "distinct tasks",
        ),
        (
            [Family(name="spell_backward", verifier="numeric")],
            {},
            "'numeric' does not accept the gold answer",
        ),
        ([Family(name="chain_sum", verifier="nummeric")], {}, "Did you mean 'numeric'"),
        ([Family(name="chain_sum", weight=0)], {}, "every weight must be positive"),
        ([Family(name="chain_sum")], {"template": "no place"}, r"does not contain \{question\}"),
        ([Family(name="chain_sum")], {"num_train": 0}, "At least one family and one training sample"),
        ([], {}, "At least one family"),
        ([Family(name="graph_color")], {}, "instead of a gold answer"),
        ([Family(name="arc_agi")], {}, "'reasoning_gym' does not accept the gold answer"),
    ],
)
def test_bad_requests_are_refused(
    tmp_path: Path, families: list[Family], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "out", *families, **changes)
    assert not (tmp_path / "out").exists()


def test_existing_domain_is_kept_unless_told(tmp_path: Path) -> None:
    family = Family(name="chain_sum", settings=TWO_TERMS)
    make(tmp_path, family)
    before = hashes(tmp_path)
    with pytest.raises(DataError, match="already holds"):
        make(tmp_path, family, seed=2)
    assert hashes(tmp_path) == before
    make(tmp_path, family, num_train=20, overwrite=True)
    assert sorted(hashes(tmp_path)) == ["toy-train-000000.tar", "toy-validation-000000.tar"]
    make(tmp_path, family, num_train=20, num_validation=0, overwrite=True)
    assert sorted(hashes(tmp_path)) == ["toy-train-000000.tar"], "held-out tasks may be training tasks now"


def test_held_out_prompts_that_become_training_prompts_are_held_out_no_longer(tmp_path: Path) -> None:
    source = jsonl(
        tmp_path / "a.jsonl", *({"prompt": f"p{i}", "answer": "a", "verifier": "exact"} for i in range(9))
    )
    out = tmp_path / "out"
    convert_jsonl([source], out, "m", FieldMap(), num_validation=3)
    before = hashes(out)
    (out / "m-train-000000.tar").unlink()
    with pytest.raises(DataError, match=r"already holds m-validation-\*\.tar"):
        convert_jsonl([source], out, "m", FieldMap())
    assert sorted(hashes(out)) == ["m-validation-000000.tar"], "nothing was written"
    convert_jsonl([source], out, "m", FieldMap(), num_validation=3, overwrite=True)
    assert hashes(out) == before
    convert_jsonl([source], out, "m", FieldMap(), overwrite=True)
    assert sorted(hashes(out)) == ["m-train-000000.tar"]


def _from_lines(root: Path, out: Path, num_validation: int) -> WrittenDomain:
    rows = [{"prompt": f"{i}? {'x' * 900}", "answer": "a", "verifier": "exact"} for i in range(99)]
    return convert_jsonl(
        [jsonl(root / "a.jsonl", *rows)],
        out,
        "toy",
        FieldMap(),
        num_validation=num_validation,
        overwrite=True,
    )


def _from_a_public_set(root: Path, out: Path, num_validation: int) -> WrittenDomain:
    source = jsonl(root / "p.jsonl", *({"problem": f"{i}+1? {'x' * 900}", "answer": "1"} for i in range(99)))
    conversion = Conversion(layout="polaris")
    return convert_public(
        [source], out, "toy", conversion, num_validation=num_validation, overwrite=True
    ).written


def _made(_: Path, out: Path, num_validation: int) -> WrittenDomain:
    family, settings = Family(name="chain_sum", settings=TWO_TERMS), {"prompt_suffix": "x" * 900}
    sizes: dict[str, Any] = {"num_train": 99 - num_validation, "num_validation": num_validation}
    return make(out, family, overwrite=True, shard_size=1000, **sizes, **settings)


@pytest.mark.parametrize("write", [_from_lines, _from_a_public_set, _made])
def test_a_disk_that_is_full_half_way_leaves_both_sets_as_they_were(
    tmp_path: Path, write: Callable[[Path, Path, int], WrittenDomain]
) -> None:
    out = tmp_path / "out"
    write(tmp_path, out, 20)
    before, limits = hashes(out), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (100_000, limits[1])
    )  # the training set fits, 89 samples do not
    try:
        with pytest.raises(
            OSError, match=r"cannot be written \(File too large\); .* left as it was"
        ) as raised:
            write(tmp_path, out, 89)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert raised.value.filename == str(out / "toy-validation-000000.tar")
    assert hashes(out) == before
    written = write(tmp_path, out, 89)
    train, held_out = ({s.prompt for s in samples_of(p)} for p in (written.train, written.validation))
    assert (len(train), len(held_out)) == (10, 89) and not train & held_out


def test_shards_are_published_in_an_order_that_never_mixes_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever renaming fails: new training shards never lie beside older validation shards."""
    before = {name: new_sample(number) for number, name in enumerate(("t-train", "t-validation"))}
    for failing in range(4):
        out = tmp_path / str(failing)
        write_sets({name: [sample] for name, sample in before.items()}, out)
        calls, real, unlink = iter(range(9)), os.replace, Path.unlink

        def replace(*names: Any, calls: Any = calls, failing: int = failing, real: Any = real) -> None:
            if next(calls) == failing:
                raise OSError(errno.EIO, "Input/output error")
            real(*names)

        def remove(path: Path, missing_ok: bool = False, step: Any = replace, real: Any = unlink) -> None:
            if path.parent.name.isdigit():
                step("", "", real=lambda *_: None)
            real(path, missing_ok=missing_ok)

        monkeypatch.setattr(os, "replace", replace)
        monkeypatch.setattr(Path, "unlink", remove)
        sets = {"t-train": [new_sample(1)], "t-validation": [new_sample(2)]}
        if failing == 3:
            write_sets(sets, out, overwrite=True)
        else:
            state = "holds some of the new shards" if failing else "was left as it was"
            with pytest.raises(OSError, match=state):
                write_sets(sets, out, overwrite=True)
        monkeypatch.undo()
        prompts = {p.name: samples_of([p])[0].prompt for p in out.iterdir()}
        train, held_out = prompts.get("t-train-000000.tar"), prompts.get("t-validation-000000.tar")
        assert train is not None and train != held_out, failing


def test_what_killed_tools_have_left_is_removed_and_what_living_ones_write_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = jsonl(tmp_path / "a.jsonl", GOOD), tmp_path / "out"
    left = out / ".copd-unfinished-0123456789ab"
    left.mkdir(parents=True)
    (left / "m-train-000000.tar").write_bytes(b"half")
    command = ["data", "jsonl-to-shards", str(source), "--out", str(out), "--name", "m"]
    with Staging(out) as living:
        assert main(command) == 0
        assert living.folder.is_dir() and not left.exists()
    assert [path.name for path in out.iterdir()] == ["m-train-000000.tar"]
    before, handler = hashes(out), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(_TarWriter, "add", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        main([*command, "--overwrite"])
    assert ended.value.code == 128 + signal.SIGTERM and signal.getsignal(signal.SIGTERM) is handler
    assert hashes(out) == before


@pytest.mark.parametrize("name", ["", " ", "a/b", ".hidden", "-x", "a*", "{a}"])
def test_names_that_no_pattern_would_find_are_refused(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = jsonl(tmp_path / "a.jsonl", GOOD)
    assert main(["data", "jsonl-to-shards", str(source), "--out", str(tmp_path), f"--name={name}"]) == 2
    assert "cannot begin the names of shards" in capsys.readouterr().err


def test_tool_writes_the_same_bytes_in_any_process(tmp_path: Path) -> None:
    arguments = ["--name", "mix", "--train", "50", "--validation", "10", "--seed", "7", "--shard-size", "20"]
    arguments += ["--family", "chain_sum:2", "--family", "word_sorting", "--set", "chain_sum.max_terms=3"]
    for folder, hash_seed in (("1", "1"), ("2", "2")):
        done = run_script(
            "make_text_data.py", "--out", str(tmp_path / folder), *arguments, hash_seed=hash_seed
        )
        assert done.returncode == 0, done.stderr
        assert "50 training samples in 3 shard(s)" in done.stdout and done.stderr == ""
    assert hashes(tmp_path / "1") == hashes(tmp_path / "2")
    assert len(hashes(tmp_path / "1")) == 4


def test_tool_errors_are_one_line(tmp_path: Path) -> None:
    base = ["--out", str(tmp_path), "--name", "n", "--train", "5", "--family", "chain_sum"]
    for extra, message in (
        (["--set", "min_terms"], "write setting=value"),
        (["--family", "gcd", "--set", "min_terms=2"], "family.setting=value"),
        (["--family", "gcd:many"], "'many' is not a weight"),
        (["--verifier", "nope"], "unknown verifier 'nope'"),
    ):
        done = run_script("make_text_data.py", *base, *extra)
        assert done.returncode == 2
        assert done.stderr.startswith("copd: ") and message in done.stderr and "Traceback" not in done.stderr


# ---------------------------------------------------------------- jsonl_to_shards


def jsonl(path: Path, *rows: Any) -> Path:
    lines = [
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()
        for row in rows
    ]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def test_fields_are_mapped(tmp_path: Path) -> None:
    source = jsonl(
        tmp_path / "a.jsonl",
        {"q": "1+1?", "gold": {"value": 2}, "level": "easy", "uid": "x1"},
        "",
        {
            "q": [{"role": "user", "content": "pi?"}],
            "gold": {"value": "3.14"},
            "level": "hard",
            "uid": "x2",
            "verifier": "numeric",
            "metadata": {"abs_tol": 0.01},
        },
    )
    fields = FieldMap(
        prompt="q", answer="gold.value", default_verifier="exact", extra_metadata=("level",), key="uid"
    )
    written = convert_jsonl([source], tmp_path / "out", "mine", fields, prompt_suffix=" Brief.")
    assert (written.num_train, written.validation) == (2, [])
    first, second = samples_of(written.train)
    assert (first.ref.key, first.prompt, first.answer, first.verifier) == ("x1", "1+1? Brief.", "2", "exact")
    assert first.metadata == {"level": "easy"}
    assert second.prompt == ({"role": "user", "content": "pi? Brief."},)
    assert (second.verifier, second.metadata) == ("numeric", {"abs_tol": 0.01, "level": "hard"})


def test_validation_split_is_disjoint_exact_and_reproducible(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i % 40}", "answer": str(i), "verifier": "exact"} for i in range(100)]
    source = jsonl(tmp_path / "a.jsonl", *rows)
    written = convert_jsonl([source], tmp_path / "1", "m", FieldMap(), num_validation=10, seed=3)
    train, validation = samples_of(written.train), samples_of(written.validation)
    held_out = {sample.prompt for sample in validation}
    assert len(validation) == len(held_out) == written.num_validation == 10
    kept = [row["answer"] for row in rows if row["prompt"] not in held_out]
    assert [sample.answer for sample in train] == kept
    convert_jsonl([source], tmp_path / "2", "m", FieldMap(), num_validation=10, seed=3)
    assert hashes(tmp_path / "1") == hashes(tmp_path / "2")
    other = convert_jsonl([source], tmp_path / "3", "m", FieldMap(), num_validation=10, seed=4)
    assert {sample.prompt for sample in samples_of(other.validation)} != held_out


GOOD = {"prompt": "p", "answer": "a", "verifier": "exact"}


MEDIA_FIELDS = (
    "Image_URL",
    "video_path",
    "img",
    "audio",
    "frames",
    "image_bytes",
)
BAD_LINES = {kind: bad for kind, bad in BAD_JSON.items() if kind != "a list"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{not json", "line 2: not valid JSON"),
        ([1], "line 2: is a list"),
        ({"answer": "a", "verifier": "exact"}, r"line 2: no field 'prompt'.*--prompt-field"),
        ({"prompt": "p", "answer": "a"}, r"line 2: no field 'verifier'.*--verifier NAME"),
        ({**GOOD, "answer": ["a"]}, "line 2: 'answer' must be a string, got list"),
        ({**GOOD, "answer": True}, "line 2: 'answer' must be a string, got bool"),
        ({**GOOD, "verifier": "exat"}, "line 2: unknown verifier 'exat'.*'exact'"),
        ({**GOOD, "prompt": " "}, "line 2: 'prompt' is empty"),
        ({**GOOD, "prompt": [{"role": "user", "content": [{"type": "text"}]}]}, "line 2: 'text' of part 0"),
        *((raw, "line 2: ") for _, raw in BAD_LINES.values()),
        ({"prompt": "p", "answer": "a", "verifier": None}, "line 2: 'verifier' must be a string"),
        ({**GOOD, "answer": "many", "verifier": "numeric"}, "line 2: answer 'many'.*holds no number"),
        (
            {**GOOD, "answer": "D", "verifier": "choice", "metadata": {"choices": ["x", "y"]}},
            "line 2: answer",
        ),
        ({**GOOD, "answer": ""}, "line 2: answer ''.*grades the gold answer 0"),
        ({**GOOD, "metadata": {"weight": float("nan")}}, "line 2: not valid JSON .*NaN is no number"),
        *(({**GOOD, name: ["a.png"]}, f"line 2: .*{name!r} hold media") for name in MEDIA_FIELDS),
        (
            {
                **GOOD,
                "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}],
            },
            r"line 2: the prompt has 1 image placeholder\(s\) for 0 image\(s\)",
        ),
    ],
)
def test_bad_lines_are_named_or_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, row: Any, message: str
) -> None:
    source = jsonl(tmp_path / "a.jsonl", GOOD, row, {**GOOD, "prompt": "q"})
    with pytest.raises(DataError, match=message):
        convert_jsonl([source], tmp_path / "out", "m", FieldMap())
    assert not (tmp_path / "out").exists()
    written = convert_jsonl([source], tmp_path / "out", "m", FieldMap(), skip_bad=True)
    assert [sample.prompt for sample in samples_of(written.train)] == ["p", "q"]
    assert "line 2" in caplog.text and "skipped 1 bad line(s)" in caplog.text


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("a.b", r"line 2: key 'a\.b' is empty or has a dot"),
        ("a/b", "line 2: key 'a/b'"),
        ("", "line 2: key ''"),
        ("a\nb", "line 2: key 'a"),
        ("first", r"line 2: key 'first' occurs twice, first in .*a\.jsonl, line 1"),
        (None, "line 2: key None in field 'uid' is no text or integer"),
        ([1], "line 2: key .* is no text or integer"),
    ],
)
def test_bad_keys_are_named_with_their_line(tmp_path: Path, key: Any, message: str) -> None:
    rows = [{**GOOD, "uid": "first"}, {**GOOD, "uid": key}, {**GOOD, "uid": 3}]
    source = jsonl(tmp_path / "a.jsonl", *rows)
    with pytest.raises(DataError, match=message):
        convert_jsonl([source], tmp_path / "out", "m", FieldMap(key="uid"))
    written = convert_jsonl([source], tmp_path / "out", "m", FieldMap(key="uid"), skip_bad=True)
    assert [sample.ref.key for sample in samples_of(written.train)] == ["first", "3"]


def test_fields_that_nothing_asks_for_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        {**GOOD, "level": "easy", "source": {"x": 1}, "images": [], "note": None},
        {**GOOD, "level": "hard"},
    ]
    source = jsonl(tmp_path / "a.jsonl", *rows)
    with caplog.at_level(logging.WARNING):
        convert_jsonl([source], tmp_path / "out", "m", FieldMap(extra_metadata=("source.x",)), skip_bad=True)
    assert "'level' (1 lines)" in caplog.text and "--keep NAME" in caplog.text
    assert "source" not in caplog.text.split("nothing asks for")[1] and "images" not in caplog.text


def test_what_stands_beside_a_path_is_named_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    row = {**GOOD, "answer": None, "reward_model": {"truth": "4", "style": "rule", "empty": ""}}
    source = jsonl(tmp_path / "a.jsonl", row)
    with caplog.at_level(logging.WARNING):
        convert_jsonl([source], tmp_path / "out", "m", FieldMap(answer="reward_model.truth"))
    assert "nothing asks for: 'reward_model.style' (1 lines)." in caplog.text
    media = jsonl(tmp_path / "b.jsonl", {**row, "reward_model": {"truth": "4", "image": "a.png"}})
    with pytest.raises(DataError, match=r"line 1: field\(s\) 'reward_model\.image' hold media"):
        convert_jsonl([media], tmp_path / "out2", "m", FieldMap(answer="reward_model.truth"))


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_numbers_stay_as_they_are_written(tmp_path: Path, suffix: str) -> None:
    texts = ["1e5", "1.10", "12345678901234567890.5", "0.1", "7", "-3"]
    rows = [
        f'{{"prompt": "p{i}", "answer": {text}, "verifier": "exact", "metadata": {{"x": {text}}}}}'
        for i, text in enumerate(texts)
    ]
    source = tmp_path / f"a.{suffix}"
    source.write_text("\n".join(rows) if suffix == "jsonl" else f"[{', '.join(rows)}]")
    found = samples_of(convert_jsonl([source], tmp_path / "out", "m", FieldMap()).train)
    assert [sample.answer for sample in found] == texts
    assert [sample.metadata["x"] for sample in found] == [float(text) for text in texts]


def test_what_would_replace_something_is_refused(tmp_path: Path) -> None:
    """A name that occurs twice in a line, and a kept field that the metadata has already."""
    twice = jsonl(tmp_path / "a.jsonl", '{"prompt": "p", "answer": "4", "answer": "5", "verifier": "exact"}')
    with pytest.raises(DataError, match=r"line 1: not valid JSON .*the name 'answer' occurs twice"):
        convert_jsonl([twice], tmp_path / "out", "m", FieldMap())
    rows = [{**GOOD, "level": 1, "metadata": {"level": level}} for level in (1, 2)]
    with pytest.raises(DataError, match=r"line 2: field 'level', which --keep takes .* would replace"):
        convert_jsonl(
            [jsonl(tmp_path / "b.jsonl", *rows)], tmp_path / "out", "m", FieldMap(extra_metadata=("level",))
        )


def test_repeats_of_validation_prompts_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tmp_path / "a.jsonl"
    lines = [{"prompt": f"{n % 3}?", "answer": str(n), "verifier": "exact"} for n in range(30)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    written = convert_jsonl([source], tmp_path / "out", "m", FieldMap(), num_validation=1)
    assert (written.num_train, written.num_validation) == (20, 1)
    assert "left out 9 line(s) that repeat" in caplog.text


def test_media_that_are_kept_on_purpose_are_metadata(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", {**GOOD, "images": ["a.png"]})
    written = convert_jsonl([source], tmp_path / "out", "m", FieldMap(extra_metadata=("images",)))
    assert samples_of(written.train)[0].metadata == {"images": ["a.png"]}


def test_verifiers_of_others_may_grade_as_they_like(tmp_path: Path) -> None:
    own, raises = (f"tests.support.misbehaving_verifiers:{name}" for name in ("half_a_mark", "inline_raiser"))
    fields = FieldMap(allowed_verifiers=(own, raises))
    terms = {"terms": [{"verifier": own, "weight": 0.5}, {"verifier": "exact", "weight": 0.5}]}
    source = jsonl(
        tmp_path / "a.jsonl",
        {**GOOD, "verifier": own, "answer": "0.25"},
        {**GOOD, "verifier": "weighted", "metadata": terms},
    )
    assert convert_jsonl([source], tmp_path / "out", "m", fields).num_train == 2
    failing = jsonl(tmp_path / "b.jsonl", {**GOOD, "verifier": raises})
    with pytest.raises(DataError, match=r"line 1: answer 'a'.*the verifier fails on it"):
        convert_jsonl([failing], tmp_path / "out2", "m", fields)
    unchecked = convert_jsonl([failing], tmp_path / "out3", "m", fields, check_golds=False)
    assert unchecked.num_train == 1


def test_source_problems_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.jsonl: cannot be read"):
        convert_jsonl([tmp_path / "absent.jsonl"], tmp_path, "m", FieldMap())
    with pytest.raises(DataError, match="leave none to train on"):
        convert_jsonl([jsonl(tmp_path / "a.jsonl", GOOD)], tmp_path, "m", FieldMap(), num_validation=1)
    with pytest.raises(DataError, match="no usable line"):
        convert_jsonl([jsonl(tmp_path / "b.jsonl", "")], tmp_path, "m", FieldMap())


def test_tool_converts_from_the_command_line(tmp_path: Path) -> None:
    rows = [{"question": f"{i}?", "label": i} for i in range(30)]
    source = jsonl(tmp_path / "a.jsonl", *rows)
    arguments = [str(source), "--out", str(tmp_path / "out"), "--name", "mine", "--prompt-field", "question"]
    done = run_script("jsonl_to_shards.py", *arguments, "--answer-field", "label")
    assert done.returncode == 2
    assert "line 1: no field 'verifier'" in done.stderr and "Traceback" not in done.stderr
    done = run_script(
        "jsonl_to_shards.py",
        *arguments,
        "--answer-field",
        "label",
        "--verifier",
        "numeric",
        "--validation",
        "5",
    )
    assert done.returncode == 0, done.stderr
    assert "25 training samples in 1 shard(s), 5 validation" in done.stdout
    assert len(samples_of(sorted((tmp_path / "out").glob("mine-train-*.tar")))) == 25
