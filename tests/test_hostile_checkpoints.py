"""Checkpoints from strangers: nothing in them runs, wherever they are opened, and what is wrong is named."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import socket
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from copd_megatron.checkpoint.distcp import METADATA, check_items, read_metadata
from copd_megatron.checkpoint.manifest import MANIFEST, CheckpointError, _digest, read_manifest
from copd_megatron.checkpoint.safe_pickle import check_saved, load_metadata
from copd_megatron.cli.main import main
from copd_megatron.config.schema import ParallelConfig
from copd_megatron.formats.megatron_reader import MegatronTensors, megatron_tensors_of
from copd_megatron.formats.open import open_source
from copd_megatron.merge.convert import hf_to_megatron, megatron_to_hf
from copd_megatron.merge.engine import run_merge
from copd_megatron.merge.recipe import MergeRecipe, ModelInput
from copd_megatron.report.merge_distance import branch_distances
from tests.support.hostile_pickles import pickled_programs, programs
from tests.support.layouts import Job, run_layouts
from tests.support.merge_folders import joint_checkpoint, make_family
from tests.support.models import make_model

KINDS = sorted(pickled_programs(Path("marker")))


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and a branch, as Hugging Face folders."""
    return make_family(tmp_path_factory.mktemp("family"), 1, num_hidden_layers=1)


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """A file that hostile pickles make; the test fails if it is there."""
    path = tmp_path / "ran"
    yield path
    assert not path.exists(), "a file of the checkpoint ran"


@pytest.fixture
def converted(family: list[Path], tmp_path: Path) -> Path:
    """The branch in Megatron's format."""
    hf_to_megatron(family[1], tmp_path / "megatron")
    return tmp_path / "megatron"


@pytest.mark.parametrize("kind", ["os.system, protocol 2", "eval, protocol 5", "by opcodes", "a dotted name"])
def test_without_care_they_run(tmp_path: Path, kind: str) -> None:
    """Else the tests below would prove nothing."""
    pickle.loads(pickled_programs(tmp_path / "ran")[kind])
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_no_pickle_runs_anything(tmp_path: Path, marker: Path, kind: str) -> None:
    path = tmp_path / METADATA
    path.write_bytes(pickled_programs(marker)[kind])
    with pytest.raises(CheckpointError, match=r"\.metadata asks for [\w.]+, which no checkpoint needs"):
        load_metadata(path)


@pytest.mark.parametrize("kind", sorted(programs(Path("marker"))))
def test_no_saved_object_runs_anything(marker: Path, kind: str) -> None:
    stream = io.BytesIO()
    torch.save(programs(marker)[kind], stream)
    with pytest.raises(CheckpointError, match=r"^here "):
        check_saved(stream.getvalue(), "here")


def test_the_name_that_is_refused_is_told(tmp_path: Path, marker: Path) -> None:
    (tmp_path / METADATA).write_bytes(pickled_programs(marker)["eval, protocol 5"])
    with pytest.raises(CheckpointError, match=r"asks for builtins\.eval, which"):
        load_metadata(tmp_path / METADATA)
    stream = io.BytesIO()
    torch.save(programs(marker)["os.system"], stream)
    with pytest.raises(CheckpointError, match=r"asks for posix\.system, which"):
        check_saved(stream.getvalue(), "here")


# ---- pickles that name nothing bad, and cost hours or all memory ---------------------------------------


def _shared(levels: int, last: bytes, *, key: bool = True) -> bytes:
    """A tuple that holds the one before it twice, by way of the memo, and so on."""
    twice = b"".join(
        b"h%c" % (n % 256) + b"h%c" % (n % 256) + b"\x86q%c" % ((n + 1) % 256) for n in range(levels)
    )
    return b"\x80\x02" + (b"}" if key else b"") + b")q\x00" + twice + last + b"."


_INDEX = b"ctorch.distributed.checkpoint.metadata\nMetadataIndex\n"
COSTLY: dict[str, bytes] = {
    "doubled tuples as a key": b"\x80\x04})" + b"2\x86" * 60 + b"K\x01s.",
    "shared tuples as a key": _shared(60, b"K\x01s"),
    "shared tuples as keys": b"\x80\x02}(" + _shared(60, b"K\x01u", key=False)[2:],
    "shared tuples as a key at once": b"\x80\x02(" + _shared(60, b"K\x01d", key=False)[2:],
    "shared tuples in an index": b"\x80\x02}" + _INDEX + _shared(60, b"N\x86\x81K\x01s", key=False)[2:],
    "shared tuples in an index's content": b"\x80\x02}"
    + _INDEX
    + b")\x81}U\x03fqn"
    + _shared(60, b"sbK\x01s", key=False)[2:],
    "an index that grows afterwards": b"\x80\x02"
    + _INDEX
    + b")\x81q\x00h\x00\x85q\x01"
    + b"0h\x00}U\x03fqnh\x01sb.",
    "a set of shared tuples": b"\x80\x04\x8f(" + _shared(60, b"\x90", key=False)[2:],
    "an ordered mapping of shared tuples": b"\x80\x02ccollections\nOrderedDict\n]]"
    + _shared(60, b"aK\x01aa\x85R", key=False)[2:],
    "keys of one hash": b"\x80\x02}("
    + b"".join(b"\x8a\x0a" + (n * (2**61 - 1)).to_bytes(10, "little") + b"N" for n in range(1, 40_000))
    + b"u.",
    "a memo of a hundred million": b"\x80\x04Nr" + (10**8).to_bytes(4, "little") + b".",
    "a memo of four thousand million": b"\x80\x04Nr" + (2**32 - 1).to_bytes(4, "little") + b".",
    "a memo by digits": b"Np99999999999\n.",
    "a text of a terabyte": b"\x80\x04\x8d" + (2**40).to_bytes(8, "little") + b"x.",
    "bytes of a terabyte": b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b"x.",
    "a frame of a terabyte": b"\x80\x04\x95" + (2**40).to_bytes(8, "little") + b"h\x00.",
    "a number of a million digits": b"L" + b"9" * 1_000_000 + b"L\n.",
    "lists in lists": b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
    "marks in marks": b"\x80\x02" + b"(" * 200_000 + b"t" * 200_000 + b".",
    "a class that is changed": b"\x80\x02" + _INDEX + b"N}U\x03fqnNs\x86b.",
}
"""Each takes minutes, gigabytes or the stack if it is simply loaded, or changes torch itself."""


@pytest.mark.parametrize("kind", COSTLY)
def test_no_pickle_costs_more_than_its_length(tmp_path: Path, kind: str) -> None:
    (tmp_path / METADATA).write_bytes(COSTLY[kind])
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", COSTLY[kind])
        archive.writestr("archive/version", "3\n")
    begin = time.process_time()
    with pytest.raises(CheckpointError, match=r"\.metadata is damaged") as said:
        load_metadata(tmp_path / METADATA)
    with pytest.raises(CheckpointError, match=r"^here (is damaged|asks for)"):
        check_saved(stream.getvalue(), "here")
    assert time.process_time() - begin < 5 and len(str(said.value)) < 1000


def test_a_large_index_is_taken(tmp_path: Path) -> None:
    """As many parts as a large model has, with names and sizes that they share."""
    index = {
        MetadataIndex(f"layers.{n}.weight", torch.Size([n, 0]), n): _StorageInfo("a.distcp", n, 9)
        for n in range(5000)
    }
    (tmp_path / METADATA).write_bytes(pickle.dumps(Metadata(state_dict_metadata={}, storage_data=index)))
    assert load_metadata(tmp_path / METADATA).storage_data == index


ENTRIES: dict[str, Callable[[Path, Path, Path], object]] = {
    "merge": lambda base, folder, out: run_merge(
        MergeRecipe(method="linear", models=(ModelInput(path=str(folder), parameters={"weight": 1}),)), out
    ),
    "report": lambda base, folder, out: branch_distances(base, [folder]),
    "conversion": lambda base, folder, out: megatron_to_hf(folder, out),
    "list of tensors": lambda base, folder, out: megatron_tensors_of(folder),
    "source": lambda base, folder, out: open_source(folder),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_no_entry_runs_a_folder(
    family: list[Path], converted: Path, tmp_path: Path, marker: Path, entry: str
) -> None:
    (converted / METADATA).write_bytes(pickled_programs(marker)["os.system, protocol 2"])
    with pytest.raises(CheckpointError, match=r"posix\.system"):
        ENTRIES[entry](family[0], converted, tmp_path / "out")
    assert not (tmp_path / "out").exists()


COMMANDS: dict[str, Callable[[Path, Path, Path], list[object]]] = {
    "merge": lambda base, folder, out: ["merge", folder, base, "--out", out],
    "report": lambda base, folder, out: ["merge", folder, "--base", base, "--report", out],
    "inspect": lambda base, folder, out: ["checkpoint", "inspect", folder],
    "inspect tensors": lambda base, folder, out: ["checkpoint", "inspect", folder, "--tensors"],
    "to-hf": lambda base, folder, out: ["checkpoint", "to-hf", folder, out],
}


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_runs_a_checkpoint(
    family: list[Path], converted: Path, tmp_path: Path, marker: Path, command: str, joint: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A folder by itself, and a joint checkpoint whose manifest has the digests of the hostile files."""
    (converted / METADATA).write_bytes(pickled_programs(marker)["os.system, protocol 2"])
    folder = joint_checkpoint(tmp_path, {"a": converted}, family[0]) if joint else converted
    if joint and command == "inspect tensors":
        folder = folder / "a"
    arguments = COMMANDS[command](family[0], folder, tmp_path / "out")
    assert main(list(map(str, arguments))) == 1
    assert "posix.system, which no checkpoint needs" in capsys.readouterr().err


def _load(parallel: ParallelConfig, model: Path, folder: Path) -> str:
    """What is said of a folder when an actor loads it; ``loaded`` if nothing."""
    from copd_megatron.checkpoint.actor_state import load_weights
    from tests.support.actors import make_actor

    actor = make_actor(parallel, model)
    try:
        load_weights(actor, str(folder))
    except CheckpointError as error:
        return str(error)
    return "loaded"


def _with_object(folder: Path, value: Any) -> Path:
    """Puts a saved object into a folder in Megatron's format, in the place of what Megatron always loads."""
    metadata = read_metadata(folder)
    stream = io.BytesIO()
    torch.save(value, stream)
    (folder / "x.distcp").write_bytes(stream.getvalue())
    index = MetadataIndex("common_state/shard_0_1")
    metadata.state_dict_metadata[index.fqn] = BytesStorageMetadata()
    metadata.storage_data[index] = _StorageInfo("x.distcp", 0, len(stream.getvalue()))
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    return folder


def test_no_actor_runs_a_checkpoint(tmp_path: Path, marker: Path) -> None:
    """Megatron's loader would: of the index, and of objects beside the tensors. All ranks refuse."""
    model = make_model(tmp_path / "model")
    hf_to_megatron(model, tmp_path / "good")
    folders = {name: shutil.copytree(tmp_path / "good", tmp_path / name) for name in ("index", "object")}
    (folders["index"] / METADATA).write_bytes(pickled_programs(marker)["os.system, protocol 2"])
    _with_object(folders["object"], [{"a": programs(marker)["os.system"]}])
    jobs = [Job(tp=2, args=(model, folder)) for folder in (*folders.values(), tmp_path / "good")]
    index, item, good = run_layouts(_load, jobs)
    assert all("index/.metadata asks for posix.system" in said for said in index)
    assert sorted(item)[1].startswith(str(folders["object"])) and "posix.system" in "".join(item)
    assert any("refused by another rank" in said for said in item)
    assert good == ["loaded", "loaded"]


# --- files that are none, and files that change -----------------------------------------------------------


def _shard(folder: Path) -> Path:
    return sorted(folder.glob("*.distcp"))[0]


def _in_place(folder: Path, kind: str) -> None:
    """Puts something else in the place of a file with tensors."""
    path, outside = _shard(folder), folder.parent / "private"
    path.rename(outside)
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a link out":
        path.symlink_to(outside)
    elif kind == "a link to a FIFO":
        os.mkfifo(folder.parent / "fifo")
        path.symlink_to(folder.parent / "fifo")
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a socket":
        made, here = socket.socket(socket.AF_UNIX), Path.cwd()
        os.chdir(path.parent)  # its name may be no longer than 108 bytes
        made.bind(path.name)
        os.chdir(here)
        made.close()
    else:
        path.symlink_to(path)


NO_FILES = [
    *("a FIFO", "a link out", "a link to a FIFO", "a device", "a folder", "a socket", "a link to itself"),
]


@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.timeout(120)
def test_what_is_no_file_of_the_folder_is_named(
    family: list[Path], converted: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a merge, a conversion, an inspection and before Megatron loads: nothing waits, nothing is read
    elsewhere. A second name of the same file (a hard link) is that file, and is read."""
    _in_place(converted, kind)
    name = _shard(converted).name if kind != "a link to itself" else "distcp"
    model = ModelInput(path=str(converted), parameters={"weight": 1.0})
    other = ModelInput(path=str(family[0]), parameters={"weight": 1.0})
    with pytest.raises((OSError, CheckpointError), match=name):
        run_merge(MergeRecipe(method="linear", models=(other, model)), tmp_path / "merged")
    with pytest.raises((OSError, CheckpointError), match=name):
        megatron_to_hf(converted, tmp_path / "hf")
    assert not (tmp_path / "merged").exists() and not (tmp_path / "hf").exists()
    if kind != "a folder":
        with pytest.raises(CheckpointError, match=f"{name}.*copy the checkpoint again"):
            check_items(converted)
    main(["checkpoint", "inspect", str(converted), "--json"])
    assert name in " ".join(json.loads(capsys.readouterr().out)["problems"])


def test_a_second_name_of_a_file_is_that_file(converted: Path, tmp_path: Path) -> None:
    path = _shard(converted)
    os.link(path, tmp_path / "other")
    check_items(converted)
    megatron_to_hf(converted, tmp_path / "hf")


def test_one_rank_that_cannot_look_keeps_no_other_waiting(tmp_path: Path) -> None:
    """A FIFO is seen by all ranks, or by the one whose share it is; all refuse."""
    model = make_model(tmp_path / "model")
    hf_to_megatron(model, tmp_path / "good")
    fifo = shutil.copytree(tmp_path / "good", tmp_path / "fifo")
    os.mkfifo(fifo / "common.pt")
    ((first, second),) = run_layouts(_load, [Job(tp=2, args=(model, fifo))])
    assert "common.pt is a FIFO" in first and "common.pt is a FIFO" in second


@pytest.mark.parametrize("source", ["distcp", "safetensors"])
@pytest.mark.parametrize("change", ["replaced", "written to"])
@pytest.mark.parametrize("processes", [1, 2])
def test_an_input_that_changes_makes_no_model_of_parts(
    family: list[Path], converted: Path, tmp_path: Path, source: str, change: str, processes: int
) -> None:
    """By another file of the same size, or in place, after some of it was read."""
    folder = converted if source == "distcp" else shutil.copytree(family[1], tmp_path / "branch")
    (path,) = folder.glob(f"*.{source}") if source == "safetensors" else [_shard(folder)]
    content = bytearray(path.read_bytes())
    content[-64:] = bytes(64)
    changed = []

    def change_once(done: int, total: int) -> None:
        if done and not changed:
            changed.append(done)
            if change == "replaced":
                (tmp_path / "new").write_bytes(content)
                os.replace(tmp_path / "new", path)
            else:
                with path.open("r+b") as file:
                    file.write(content)

    models = tuple(ModelInput(path=str(p), parameters={"weight": 1.0}) for p in (family[0], folder))
    recipe = MergeRecipe(method="linear", models=models)
    work: dict[str, Any] = {"shard_bytes": 20_000, "processes": processes, "threads": 1}
    run_merge(recipe, tmp_path / "expected", **work)
    try:
        run_merge(recipe, tmp_path / "merged", progress=change_once, **work)
    except OSError as error:
        assert re.search("was changed while it was read|has been changed or replaced", str(error))
        assert not (tmp_path / "merged").exists()
    else:  # what was opened before stays as it was
        assert source == "safetensors" and change == "replaced"
        for made in (tmp_path / "expected").iterdir():
            assert made.read_bytes() == (tmp_path / "merged" / made.name).read_bytes()
    assert changed


def test_objects_that_training_saves_are_no_programs(converted: Path) -> None:
    """Random states, counters, and Transformer Engine's bytes in memory."""
    stream = io.BytesIO()
    torch.save({"amax": torch.ones(2)}, stream)
    saved = {"state": (1, [2.5, None], {"t": torch.ones(3)}), "extra": stream}
    check_items(_with_object(converted, saved))


# ---- indices and manifests that are whole, and wrong -----------------------------------------------------


def _spoil(converted: Path, change: Callable[[Any], None]) -> None:
    metadata = read_metadata(converted)
    change(metadata)
    (converted / METADATA).write_bytes(pickle.dumps(metadata))


def _first(metadata: Any) -> Any:
    return next(iter(metadata.storage_data.values()))


WRONG: dict[str, Callable[[Any], None]] = {
    "a file outside": lambda m: setattr(_first(m), "relative_path", "../../../etc/passwd"),
    "an absolute file": lambda m: setattr(_first(m), "relative_path", "/etc/passwd"),
    "a negative offset": lambda m: setattr(_first(m), "offset", -1),
    "a length that is a text": lambda m: setattr(_first(m), "length", "9"),
    "no storage": lambda m: setattr(m, "storage_data", None),
    "no tensors": lambda m: setattr(m, "state_dict_metadata", []),
    "a tensor that is a number": lambda m: m.state_dict_metadata.update({"lm_head": 3}),
    "a type that is a text": lambda m: [
        setattr(entry.properties, "dtype", "float32")
        for entry in m.state_dict_metadata.values()
        if hasattr(entry, "properties")
    ],
    "a size that is negative": lambda m: [
        setattr(entry, "size", (-1,) * len(entry.size))
        for entry in m.state_dict_metadata.values()
        if hasattr(entry, "size")
    ],
    "chunks elsewhere": lambda m: [
        setattr(chunk, "offsets", torch.Size([9] * len(chunk.offsets)))
        for entry in m.state_dict_metadata.values()
        for chunk in getattr(entry, "chunks", [])
    ],
}


@pytest.mark.parametrize("kind", WRONG)
def test_an_index_that_is_wrong_is_named(converted: Path, kind: str) -> None:
    _spoil(converted, WRONG[kind])
    with pytest.raises(CheckpointError, match=r"\.metadata is damaged"):
        open_source(converted)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=300), cut=st.integers(0, 10_000), insert=st.booleans())
def test_a_damaged_index_never_ends_otherwise(
    tmp_path: Path, index: bytes, data: bytes, cut: int, insert: bool
) -> None:
    """Bytes put in place of, or among, those of a good one."""
    position = cut % len(index)
    rest = index[position:] if insert else index[position + len(data) :]
    (tmp_path / METADATA).write_bytes(index[:position] + data + rest)
    try:
        read_metadata(tmp_path)
    except CheckpointError as error:
        assert str(tmp_path / METADATA) in str(error)


@pytest.fixture(scope="module")
def index(family: list[Path], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A good index."""
    folder = tmp_path_factory.mktemp("index") / "megatron"
    hf_to_megatron(family[1], folder)
    return (folder / METADATA).read_bytes()


def _rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes a manifest and gives it the digest that then is right."""
    record = json.loads((folder / MANIFEST).read_text())
    change(record["manifest"])
    record["sha256"] = _digest(record["manifest"])
    (folder / MANIFEST).write_text(json.dumps(record))


MANIFESTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a field more": lambda m: m.update(colour="red"),
    "a field less": lambda m: m.pop("step"),
    "a step that is a text": lambda m: m.update(step="4"),
    "branches in a list": lambda m: m.update(branches=[1]),
    "a branch that is a number": lambda m: m.update(branches={"a": 1}),
    "a branch with a field more": lambda m: m["branches"]["a"].update(colour="red"),
    "a branch with a field less": lambda m: m["branches"]["a"].pop("dims"),
    "a branch outside": lambda m: m.update(branches={"../a": m["branches"]["a"]}),
    "a file outside": lambda m: m["branches"]["a"]["files"][0].update(path="../../etc/passwd"),
    "an absolute file": lambda m: m["branches"]["a"]["files"][0].update(path="/etc/passwd"),
    "a size that is a text": lambda m: m["branches"]["a"]["files"][0].update(num_bytes="1"),
    "files that are none": lambda m: m["branches"]["a"].update(files=None),
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_manifest_with_a_right_digest_and_other_fields_is_named(
    family: list[Path], converted: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = joint_checkpoint(tmp_path, {"a": converted}, family[0])
    _rewrite(checkpoint, MANIFESTS[kind])
    with pytest.raises(CheckpointError, match=rf"{checkpoint}/manifest\.json is no manifest of this version"):
        read_manifest(checkpoint)
    assert main(["merge", str(checkpoint), "--out", str(tmp_path / "out")]) == 1
    assert str(checkpoint / MANIFEST) in capsys.readouterr().err


def test_sizes_that_are_no_models_are_named(family: list[Path], converted: Path, tmp_path: Path) -> None:
    checkpoint = joint_checkpoint(tmp_path, {"a": converted}, family[0])
    _rewrite(checkpoint, lambda m: m["branches"]["a"]["dims"].update(colour="red"))
    with pytest.raises(CheckpointError, match=r"manifest\.json: the sizes of a are not those of a model"):
        open_source(checkpoint / "a")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"manifest":' * 50_000, "\xff", "[]", "3"])
def test_a_manifest_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "record",
    [
        {"../../out.safetensors": "e30="},
        {"/tmp/out.safetensors": "e30="},
        {"model.safetensors": "not base 64"},
        {"model.safetensors": "e30"},
        {"model.safetensors": 3},
    ],
)
def test_recorded_files_stay_in_the_folder(converted: Path, tmp_path: Path, record: dict[str, Any]) -> None:
    (converted / "hf" / "safetensors.headers").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"safetensors\.headers"):
        megatron_to_hf(converted, tmp_path / "deep" / "out")
    assert not list(tmp_path.rglob("out.safetensors"))


def test_a_branch_of_a_manifest_is_a_folder_beside_it(
    family: list[Path], converted: Path, tmp_path: Path
) -> None:
    """As it is written: read back unchanged."""
    checkpoint = joint_checkpoint(tmp_path, {"a": converted}, family[0])
    manifest = read_manifest(checkpoint)
    assert replace(manifest, step=5) != manifest and list(manifest.branches) == ["a"]


# ---- what is missing, and what overlaps ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["missing", "short"])
def test_a_folder_without_its_files_is_not_called_whole(
    kind: str, converted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoint", "inspect", str(converted)]) == 0
    (file,) = converted.glob("*.distcp")
    if kind == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1])
    capsys.readouterr()
    assert main(["checkpoint", "inspect", str(converted)]) == 1
    told = capsys.readouterr().out
    assert "DAMAGED" in told and str(file) in told
    assert main(["checkpoint", "inspect", str(converted), "--json"]) == 1
    assert main(["checkpoint", "inspect", str(converted), "--verify"]) == 1
    assert "compares with a manifest" in capsys.readouterr().err


def test_parts_that_overlap_and_leave_a_hole_are_no_tensor(converted: Path) -> None:
    index = read_metadata(converted)
    key, entry = next(
        (key, entry)
        for key, entry in index.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and key.startswith("embedding")
    )
    (chunk,) = entry.chunks
    rows, width = entry.size
    first = next(place for place in index.storage_data if place.fqn == key)
    second = MetadataIndex(key, torch.Size([rows // 2, 0]))
    entry.size = torch.Size([2 * rows, width])
    entry.chunks = [chunk, ChunkStorageMetadata(offsets=second.offset, sizes=chunk.sizes)]  # type: ignore[arg-type]
    index.storage_data[second] = index.storage_data[first]
    (converted / METADATA).write_bytes(pickle.dumps(index))
    tensors = MegatronTensors(converted)
    with pytest.raises(CheckpointError, match=f"the parts of {key} overlap or leave a hole"):
        tensors.read_rows(key, (), 0, torch.empty(2 * rows, width))


def test_an_archive_whose_directory_claims_gigabytes_is_damaged(converted: Path, tmp_path: Path) -> None:
    """A sparse file costs its maker nothing; reading the directory whole would cost the reader 30 GB."""
    claimed = 30 << 30

    def claim(metadata: Any) -> None:
        place = next(value for key, value in metadata.storage_data.items() if "embedding" in key.fqn)
        shard = converted / place.relative_path
        begin = shard.stat().st_size
        ends = (
            struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, claimed, 0),
            struct.pack("<4sLQL", b"PK\6\7", 0, claimed, 1),
            struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0),
        )
        with shard.open("r+b") as file:
            file.seek(begin + claimed)
            file.write(b"".join(ends))
        place.offset, place.length = begin, claimed + sum(map(len, ends))

    _spoil(converted, claim)
    with pytest.raises(CheckpointError, match=r"\.distcp"):
        megatron_to_hf(converted, tmp_path / "out")
