"""Shards: found, checked, indexed, read, written."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copd_megatron.data import (
    DataError,
    SampleRef,
    ShardSet,
    check_shards,
    expand_patterns,
)
from copd_megatron.data.convert.write import write_shards
from copd_megatron.data.shards import shard_names
from tests.support.shards import new_sample, record, scan_tar, with_other_questions, write, write_raw

# ---- finding shards ----------------------------------------------------------------------------------------


def test_paths_globs_and_braces(tmp_path: Path) -> None:
    write(tmp_path, 40)
    names = [f"toy-train-{i:06d}.tar" for i in range(4)]
    glob_found = expand_patterns([str(tmp_path / "*.tar")])
    assert [path.name for path in glob_found] == names
    assert [p.name for p in expand_patterns([str(tmp_path / "toy-train-{000001..000003}.tar")])] == names[1:]
    assert [p.name for p in expand_patterns([str(tmp_path / "toy-train-00000{3,0}.tar")])] == [
        names[3],
        names[0],
    ]
    both = expand_patterns([str(tmp_path / names[2]), str(tmp_path / "*.tar")])
    assert [path.name for path in both] == [names[2], names[0], names[1], names[3]]


def test_a_pattern_without_match_says_what_the_folder_holds(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no \.tar file"):
        expand_patterns([str(tmp_path / "x-*.tar")])
    write(tmp_path, 3)
    with pytest.raises(DataError, match=r"x-\*\.tar.*holds 1 \.tar file\(s\), such as toy-train-000000\.tar"):
        expand_patterns([str(tmp_path / "x-*.tar")])
    with pytest.raises(DataError, match="does not exist"):
        expand_patterns([str(tmp_path / "absent" / "*.tar")])
    with pytest.raises(DataError, match=r"000001\.tar.*from.*\{000000\.\.000001\}"):
        expand_patterns([str(tmp_path / "toy-train-{000000..000001}.tar")])
    with pytest.raises(DataError, match=r"is a folder.*\*\.tar"):
        expand_patterns([str(tmp_path)])
    with pytest.raises(DataError, match="Close every brace"):
        expand_patterns([str(tmp_path / "toy-{0..1.tar")])
    with pytest.raises(DataError, match="no shards are named"):
        expand_patterns([])


def test_shards_of_one_name_in_two_folders_stay_apart(tmp_path: Path) -> None:
    for domain in ("a", "b"):
        write(tmp_path / domain, 2, prefix="train")
    write(tmp_path / "c", 2, prefix="other")
    shards = ShardSet.open([str(tmp_path / "*" / "*.tar")])
    assert [index.name for index in shards.indexes] == ["a/train-000000", "b/train-000000", "other-000000"]
    assert len({ref.id for ref in shards.refs}) == 6
    assert shard_names([Path("/x/y/s.tar"), Path("/z/y/s.tar")]) == ["x/y/s", "z/y/s"]


# ---- refusing bad shards -----------------------------------------------------------------------------------


def truncated(path: Path, keep: Callable[[int], int]) -> str:
    write(path.parent, 10, prefix="good")
    whole = (path.parent / "good-000000.tar").read_bytes()
    path.write_bytes(whole[: keep(len(whole))])
    return str(path)


BAD_SHARDS: dict[str, tuple[Callable[[Path], str], str]] = {
    "no bytes": (lambda path: str(path.write_bytes(b"") or path), "no bytes"),
    "no members": (lambda path: write_raw(path, []), "empty, it holds no samples"),
    "not a tar": (
        lambda path: str(path.write_bytes(b"hello" * 1000) and path),
        r"not a readable tar \(not a tar\)",
    ),
    "cut in data": (lambda path: truncated(path, lambda n: 1024 * 3 + 520), "cut off at byte 3592, within"),
    "cut in header": (lambda path: truncated(path, lambda n: 1024 * 3 + 100), "cut off at byte 3172"),
    "cut between members": (lambda path: truncated(path, lambda n: 1024 * 3), "cut off at byte 3072"),
    "no json": (lambda path: write_raw(path, [("a.txt", b"x")]), r"no sample has a \.json.*\['txt'\]"),
    "twice": (lambda path: write_raw(path, [("a.json", record())] * 2), "'a.json' occurs twice"),
    "compressed": (lambda path: str(path.write_bytes(b"\x1f\x8b" + b"0" * 600) and path), "gzip.*Decompress"),
    "first has no json": (
        lambda path: write_raw(path, [("a.txt", b"x"), ("b.json", record())]),
        r"sample 'a'.*no \.json member",
    ),
    "not json": (lambda path: write_raw(path, [("a.json", b"{")]), "sample 'a'.*not valid JSON"),
    "not utf-8": (lambda path: write_raw(path, [("a.json", b'"\xff"')]), "sample 'a'.*not valid JSON"),
    "not an object": (lambda path: write_raw(path, [("a.json", b"[1]")]), "sample 'a'.*must be an object"),
    "missing field": (
        lambda path: write_raw(path, [("a.json", record(answer=...))]),
        "sample 'a'.*'answer' missing.*jsonl_to_shards",
    ),
    "bad prompt": (lambda path: write_raw(path, [("a.json", record(prompt=7))]), "'prompt' must be.*int 7"),
    "empty prompt": (lambda path: write_raw(path, [("a.json", record(prompt=" "))]), "'prompt' is empty"),
    "empty messages": (lambda path: write_raw(path, [("a.json", record(prompt=[]))]), "empty list"),
    "bad message": (
        lambda path: write_raw(path, [("a.json", record(prompt=[{"role": "user"}]))]),
        "'content' of message 0",
    ),
    "bad answer": (lambda path: write_raw(path, [("a.json", record(answer=1))]), "'answer' must be a string"),
    "bad metadata": (lambda path: write_raw(path, [("a.json", record(metadata=[]))]), "'metadata' must be"),
    "unknown verifier": (
        lambda path: write_raw(path, [("a.json", record(verifier="exat"))]),
        r"'exat'.*Did you mean 'exact'\?.*reward\.verifiers",
    ),
}


@pytest.mark.parametrize("kind", BAD_SHARDS)
def test_bad_shards_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    make, message = BAD_SHARDS[kind]
    path = tmp_path / "shard-000007.tar"
    pattern = make(path)
    with pytest.raises(DataError, match=message) as caught:
        check_shards([pattern], verifiers=["exact", "math"])
    assert "shard-000007.tar" in str(caught.value)


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    write(tmp_path, 10)
    path = tmp_path / "toy-train-000000.tar"
    data = bytearray(path.read_bytes())
    data[5 * 1024 + 10] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"toy-train-000000\.tar.*damaged header at byte 5120"):
        ShardSet.open([str(path)])


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_header_scan_agrees_with_tarfile(tmp_path: Path, format: int) -> None:
    path = tmp_path / "s.tar"
    names = ["a.json", "d/" + "n" * 90 + ".json", ("p" * 60 + "/") * 2 + "k.json", "\u00fc.json", "b.txt"]
    if format != tarfile.USTAR_FORMAT:
        names.append("l" * 300 + ".json")
    with tarfile.open(path, "w", format=format) as tar:
        for size, name in enumerate(names, start=510):
            info = tarfile.TarInfo(name)
            info.size = size
            info.mtime = 1e9 + 0.5 if format == tarfile.PAX_FORMAT else 10**9
            tar.addfile(info, io.BytesIO(b"x" * size))
            folder = tarfile.TarInfo(f"folder{size}")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
    with tarfile.open(path) as tar:
        expected = [(info.name, info.offset_data, info.size) for info in tar if info.isreg()]
    assert list(map(tuple, scan_tar(path))) == expected
    assert len(expected) == len(names)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_prefix_of_a_shard_passes_for_whole(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    folder = tmp_path_factory.mktemp("prefix")
    write(folder, 4)
    path = folder / "toy-train-000000.tar"
    whole = path.read_bytes()
    end = list(scan_tar(path))[-1]
    needed = -(-(end.offset + end.size) // 512) * 512 + 512
    path.write_bytes(whole[: data.draw(st.integers(0, needed - 1))])
    with pytest.raises(DataError, match=r"cut off|no bytes"):
        ShardSet.open([str(path)])


def test_an_unreadable_shard_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 1)
    os.symlink(tmp_path / "gone.tar", tmp_path / "link.tar")
    with pytest.raises(DataError, match=r"link\.tar.*cannot be read"):
        check_shards([str(tmp_path / "*.tar")])


# ---- reading -----------------------------------------------------------------------------------------------


def test_round_trip_and_random_access(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Grüße \u2028 ∑"}]
    samples = [
        new_sample(0, media={"0.png": b"\x89PNG0", "mp4": b"film"}),
        new_sample(1, prompt=messages, key="a-key"),
        new_sample(2),
    ]
    write_shards(samples, tmp_path, "toy", shard_size=2)
    shards = check_shards([str(tmp_path / "*.tar")], ["exact"])
    assert [ref.id for ref in shards] == ["toy-000000/000000000", "toy-000000/a-key", "toy-000001/000000002"]
    assert len(shards) == 3
    third = shards.read(SampleRef("toy-000001", "000000002"))
    assert (third.prompt, third.answer, third.verifier) == ("What is 2?", "2", "exact")
    assert third.metadata == {"number": 2} and third.media == ()
    assert shards.read(shards.refs[1]).prompt == tuple(messages)
    first = shards.read(shards.refs[0])
    assert first.media == ("0.png", "mp4")
    assert shards.read_member(first.ref, "0.png") == b"\x89PNG0"
    assert shards.read_member(first.ref, "mp4") == b"film"
    with pytest.raises(DataError, match=r"no \.1\.png member"):
        shards.read_member(first.ref, "1.png")
    with pytest.raises(DataError, match=r"no sample with this key.*same shards"):
        shards.read(SampleRef("toy-000000", "absent"))
    with pytest.raises(DataError, match="no such shard"):
        shards.read(SampleRef("absent", "a"))


def test_webdataset_reads_our_shards_and_we_read_its(tmp_path: Path) -> None:
    import webdataset  # takes torch along

    write(tmp_path, 5)
    rows = list(webdataset.WebDataset(str(tmp_path / "toy-train-000000.tar"), shardshuffle=False))
    assert [json.loads(row["json"])["answer"] for row in rows] == list("01234")
    long_key = "folder/" + "k" * 150
    with webdataset.TarWriter(str(tmp_path / "theirs.tar")) as sink:
        sink.write(
            {"__key__": long_key, "json": {"prompt": "p", "answer": "a", "verifier": "exact"}, "0.png": b"x"}
        )
    shards = check_shards([str(tmp_path / "theirs.tar")])
    assert shards.refs == (SampleRef("theirs", long_key),)
    assert shards.read(shards.refs[0]).media == ("0.png",)


def test_a_shard_that_shrinks_during_the_run_is_an_error(tmp_path: Path) -> None:
    shards = check_shards([write(tmp_path, 10)])
    path = tmp_path / "toy-train-000000.tar"
    path.write_bytes(path.read_bytes()[:1200])
    with pytest.raises(DataError, match="changed or replaced while in use"):
        shards.read(shards.refs[9])
    path.unlink()
    with pytest.raises(DataError, match="cannot be read any more"):
        shards.read(shards.refs[0])


def test_fingerprint_tells_data_sets_apart(tmp_path: Path) -> None:
    one, two = ShardSet.open([write(tmp_path / "1", 20)]), ShardSet.open([write(tmp_path / "2", 20)])
    other = ShardSet.open([write(tmp_path / "3", 21)])
    assert one.fingerprint == two.fingerprint != other.fingerprint


def test_fingerprint_tells_apart_what_differs_in_what_it_says_alone(tmp_path: Path) -> None:
    """Written anew with other questions of equal lengths. Of a long member the ends count, and not its
    middle."""
    pattern = write(tmp_path / "one", 20)
    one, other = (ShardSet.open([p]) for p in (pattern, with_other_questions(pattern, tmp_path / "other")))
    assert one.outline == other.outline and one.fingerprint != other.fingerprint
    assert one.indexes[0].outline == other.indexes[0].outline
    assert one.indexes[0].fingerprint != other.indexes[0].fingerprint
    found = set()
    for number, video in enumerate((b"a" * 20_000, b"b" + b"a" * 19_999, b"a" * 19_999 + b"b", b"", b"a")):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_raw(folder / "long.tar", [("1.json", record()), ("1.mp4", video)])
        found.add(ShardSet.open([str(folder / "long.tar")]).fingerprint)
    assert len(found) == 5
    path = tmp_path / "one/toy-train-000000.tar"
    changing = ShardSet.open([str(path)])
    path.write_bytes(path.read_bytes() + bytes(512))
    with pytest.raises(DataError, match="changed or replaced while in use"):
        assert changing.fingerprint


# ---- writing -----------------------------------------------------------------------------------------------


def test_written_bytes_are_reproducible(tmp_path: Path) -> None:
    for folder in ("1", "2"):
        write(tmp_path / folder, 25)
    for path in sorted((tmp_path / "1").iterdir()):
        assert path.read_bytes() == (tmp_path / "2" / path.name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "1").iterdir()) == [
        f"toy-train-{i:06d}.tar" for i in range(3)
    ]


def test_webdataset_would_write_the_same_bytes(tmp_path: Path) -> None:
    import webdataset

    samples = [new_sample(i, key=f"k\u00e9y{i}" * 30, media={"0.png": b"x" * 700 * i}) for i in range(4)]
    (path,) = write_shards(samples, tmp_path, "toy")
    theirs = io.BytesIO()
    with webdataset.TarWriter(theirs, user="", group="", mode=0o644, mtime=0, encoder=False) as sink:
        for ref in (shards := ShardSet.open([str(path)])):
            for extension in ("json", "0.png"):
                sink.write({"__key__": ref.key, extension: shards.read_member(ref, extension)})
    assert path.read_bytes() == theirs.getvalue()


def test_a_failed_write_leaves_no_torn_shard(tmp_path: Path) -> None:
    def samples() -> Any:
        yield from map(new_sample, range(15))
        yield new_sample(15, metadata={"bad": object()})

    with pytest.raises(DataError, match=r"sample '000000015' of toy-000001\.tar.*JSON"):
        write_shards(samples(), tmp_path, "toy", shard_size=10)
    assert list(tmp_path.iterdir()) == []
    write(tmp_path, 3, prefix="toy")
    before = (tmp_path / "toy-000000.tar").read_bytes()
    with pytest.raises(DataError, match="JSON"):
        write_shards(samples(), tmp_path, "toy", shard_size=10, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["toy-000000.tar"]
    assert (tmp_path / "toy-000000.tar").read_bytes() == before


def test_existing_shards_are_not_overwritten_unasked(tmp_path: Path) -> None:
    write(tmp_path, 30)
    write(tmp_path, 5, prefix="toy-train-more")
    with pytest.raises(DataError, match=r"already holds 3 shard\(s\) named toy-train-\*"):
        write(tmp_path, 10)
    write_shards(map(new_sample, range(10)), tmp_path, "toy-train", shard_size=10, overwrite=True)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("keys", [["a", "a"], ["a.b"], ["a/b"], [""]])
def test_bad_keys_are_refused(tmp_path: Path, keys: list[str]) -> None:
    with pytest.raises(DataError, match=r"key '.*' (occurs twice|is empty or has a dot, a slash or)"):
        write_shards([new_sample(0, key=key) for key in keys], tmp_path, "toy")
