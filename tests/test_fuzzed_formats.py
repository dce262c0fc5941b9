"""Damaged settings, manifests, tensor files, messages, pickles and tokenizers at random: whatever is read is
understood, or refused in the reader's own words."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from copd_megatron.checkpoint.manifest import (
    MANIFEST,
    BranchEntry,
    CheckpointError,
    FileEntry,
    Manifest,
    _digest,
    read_manifest,
    write_manifest,
)
from copd_megatron.checkpoint.safe_pickle import check_saved, load_metadata
from copd_megatron.config import ConfigError, load_config, validate
from copd_megatron.hf.folder import HFFolder
from copd_megatron.hf.tokens import merge_rules, token_ids
from copd_megatron.opd.records import Ask, ScoreRequest, TeacherScore
from copd_megatron.opd.wire import (
    Header,
    Message,
    RouterError,
    pack_requests,
    pack_scores,
    unpack_requests,
    unpack_scores,
)
from copd_megatron.topology.messages import MessageError, decode, encode
from tests.support.commands import ROOT
from tests.support.fuzzing import LONG, SHORT, damaged, damaged_value

# --- settings -----------------------------------------------------------------------------------------------

CONFIGS = [path.read_bytes() for path in sorted((ROOT / "configs").glob("*.yaml"))]


def fuzz_settings(data: st.DataObject, folder: Path) -> None:
    path = folder / "run.yaml"
    path.write_bytes(damaged(data, data.draw(st.sampled_from(CONFIGS)), places=3))
    try:
        validate(load_config(path), None, None)
    except ConfigError as error:
        assert str(error)


# --- checkpoints --------------------------------------------------------------------------------------------


def _manifest(folder: Path) -> dict[str, Any]:
    file = FileEntry(path="a/x.distcp", num_bytes=7, sha256="0" * 64)
    entry = BranchEntry(
        weight_version=1, layout={"tp": 1}, frozen=False, model_path="m", dims={"tp": 1}, files=(file,)
    )
    write_manifest(folder, Manifest(step=1, branches={"a": entry}, config="run: {}", saved_at="2030"))
    content: dict[str, Any] = json.loads((folder / MANIFEST).read_text())["manifest"]
    return content


def fuzz_manifest(data: st.DataObject, folder: Path) -> None:
    content = damaged_value(data, _manifest(folder))
    record = {"manifest": content, "sha256": _digest(content)}
    (folder / MANIFEST).write_text(json.dumps(record))
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        assert str(folder) in str(error)
    else:
        assert isinstance(manifest.step, int)
        for name, branch in manifest.branches.items():
            assert all(
                (folder / file.path).resolve().is_relative_to(folder.resolve()) for file in branch.files
            )
            assert Path(name).name == name


def _index() -> bytes:
    tensor = TensorStorageMetadata(
        properties=TensorProperties(),
        size=torch.Size([4]),
        chunks=[ChunkStorageMetadata(offsets=torch.Size([0]), sizes=torch.Size([4]))],
    )
    return pickle.dumps(Metadata(state_dict_metadata={"w": tensor, "b": BytesStorageMetadata()}))


INDEX = _index()


def fuzz_index(data: st.DataObject, folder: Path) -> None:
    path = folder / ".metadata"
    path.write_bytes(damaged(data, INDEX))
    try:
        load_metadata(path)
    except CheckpointError as error:
        assert str(path) in str(error)


def _saved() -> bytes:
    file = io.BytesIO()
    torch.save({"a": torch.arange(5), "b": [1, "x", None]}, file)
    return file.getvalue()


SAVED = _saved()


def fuzz_saved(data: st.DataObject, folder: Path) -> None:
    try:
        check_saved(damaged(data, SAVED), "here")
    except CheckpointError as error:
        assert str(error).startswith("here ")


# --- models -------------------------------------------------------------------------------------------------

TENSORS = save(
    {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, {"format": "pt"}
)


def fuzz_tensors(data: st.DataObject, folder: Path) -> None:
    """No file is read that the library refuses."""
    path = folder / "model.safetensors"
    path.write_bytes(damaged(data, TENSORS, places=3))
    try:
        found = HFFolder(folder)
        values = {name: found.read(name) for name in found.names()}
    except ValueError as error:
        assert str(folder) in str(error)
        return
    try:
        with safe_open(path, "pt") as theirs:
            assert {*theirs.keys()} == {*values}
            for name, value in values.items():
                ours, other = value.contiguous(), theirs.get_tensor(name).contiguous()
                assert ours.dtype is other.dtype and ours.shape == other.shape
                assert torch.equal(ours.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
    except SafetensorError as error:
        raise AssertionError(f"the library refuses what was read: {error}") from error


TOKENIZER = {
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b", ["a", "b"]]},
    "added_tokens": [{"content": "<x>", "id": 3}],
}


def fuzz_tokenizer(data: st.DataObject, folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(damaged_value(data, TOKENIZER)))
    try:
        ids, _ = token_ids(folder), merge_rules(folder)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert ids is not None and all(isinstance(number, int) for number in ids.values())


# --- what travels between ranks -----------------------------------------------------------------------------

MESSAGE = encode({"a": np.arange(5), "b": [1, (2.5, "x")], "c": Path("runs/a"), 3: None})


def fuzz_message(data: st.DataObject, folder: Path) -> None:
    try:
        decode(damaged(data, MESSAGE))
    except MessageError as error:
        assert str(error)


def _lanes() -> tuple[Message, Message]:
    rows = [
        ScoreRequest(
            row_id=i,
            token_ids=np.arange(6, dtype=np.int32),
            prompt_length=4,
            weight_version=1,
            ask=Ask(tokens=True, positions=(0, 1)),
        )
        for i in range(2)
    ]
    scores = [
        TeacherScore(
            row_id=i,
            weight_version=1,
            logprobs=np.zeros(2, np.float32),
            distributions=np.zeros((2, 5), np.float32),
        )
        for i in range(2)
    ]
    asked = pack_requests(rows, (0, 1), exchange=1, edge=0, lane=0)
    told = pack_scores(scores, (0, 1), exchange=1, edge=0, lane=0, crc=asked.header.ids_crc)
    return asked, told


LANES = _lanes()


def fuzz_lane(data: st.DataObject, folder: Path) -> None:
    """Header and payload of another length than its header says included."""
    which = data.draw(st.integers(0, 1))
    message = LANES[which]
    header = message.header
    if data.draw(st.booleans()):
        name = data.draw(st.sampled_from([f.name for f in dataclasses.fields(Header)]))
        number = data.draw(st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 300))
        header = dataclasses.replace(header, **{name: number})
    payload = np.frombuffer(damaged(data, message.payload.tobytes()), dtype=np.uint8)
    if data.draw(st.booleans()):  # a sender that means what it sends
        header = dataclasses.replace(header, payload_bytes=payload.nbytes, payload_crc=zlib.crc32(payload))
    received: Any = None
    try:
        known = Header.unpack(header.pack(), "here")
        received = (unpack_scores if which else unpack_requests)(
            Message(header=known, payload=payload), "here"
        )
    except RouterError as error:
        assert str(error).startswith("here")
    else:
        assert len(received) <= known.num_rows


FUZZERS = [
    fuzz_settings,
    fuzz_manifest,
    fuzz_index,
    fuzz_saved,
    fuzz_tensors,
    fuzz_tokenizer,
    fuzz_message,
    fuzz_lane,
]


@pytest.mark.parametrize("fuzz", FUZZERS)
def test_what_is_damaged_is_refused_in_our_words(fuzz: Any, tmp_path: Path) -> None:
    SHORT(given(st.data())(lambda data: fuzz(data, tmp_path)))()


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("fuzz", FUZZERS)
def test_long_fuzzing(fuzz: Any, tmp_path: Path) -> None:
    LONG(given(st.data())(lambda data: fuzz(data, tmp_path)))()
