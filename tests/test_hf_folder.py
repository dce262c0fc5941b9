"""Hugging Face folders: headers as the safetensors library judges them, which files count, ranges, modes."""

from __future__ import annotations

import json
import logging
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from copd_megatron.config import ConfigError
from copd_megatron.hf import companions
from copd_megatron.hf.folder import HFFolder
from copd_megatron.hf.header import MAX_HEADER_BYTES, parse_header
from copd_megatron.hf.model_config import read_model_shape
from copd_megatron.hf.planned_file import write_safetensors
from copd_megatron.model.slots import Stack
from tests.support.merge_folders import CONFIG, write_folder

Header = dict[str, Any]


def write_raw(folder: Path, header: bytes, data: bytes, *, length: int | None = None) -> Path:
    """A file with this header, whatever it says; ``length``: what the file says the header's is."""
    folder.mkdir(exist_ok=True)
    size = len(header) if length is None else length
    (folder / "model.safetensors").write_bytes(size.to_bytes(8, "little") + header + data)
    return folder


def library_accepts(file: Path) -> bool:
    try:
        with safe_open(file, framework="pt") as handle:
            list(handle.keys())
    except (SafetensorError, OSError):
        return False
    return True


def tensor(begin: int, end: int, shape: list[Any] | None = None, dtype: str = "F32") -> Header:
    shape = [(end - begin) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


# ---- headers -----------------------------------------------------------------------------------------------

HOSTILE: dict[str, tuple[bytes, int]] = {
    "overlapping": (json.dumps({"a": tensor(0, 8), "b": tensor(4, 12)}).encode(), 12),
    "the same bytes twice": (json.dumps({"a": tensor(0, 8), "b": tensor(0, 8)}).encode(), 8),
    "a gap": (json.dumps({"a": tensor(0, 4), "b": tensor(8, 12)}).encode(), 12),
    "not from the start": (json.dumps({"a": tensor(4, 8)}).encode(), 8),
    "end before begin": (json.dumps({"a": tensor(8, 0, [2])}).encode(), 8),
    "negative begin": (json.dumps({"a": tensor(-4, 4, [2])}).encode(), 4),
    "fewer bytes than the shape": (json.dumps({"a": tensor(0, 4, [2])}).encode(), 4),
    "more bytes than the shape": (json.dumps({"a": tensor(0, 8, [1])}).encode(), 8),
    "bytes that no tensor has": (json.dumps({"a": tensor(0, 4)}).encode(), 8),
    "negative shape": (json.dumps({"a": tensor(0, 4, [-1])}).encode(), 4),
    "two negative sizes": (json.dumps({"a": tensor(0, 4, [-1, -1])}).encode(), 4),
    "fractional shape": (json.dumps({"a": tensor(0, 4, [1.0])}).encode(), 4),
    "boolean shape": (json.dumps({"a": tensor(0, 4, [True])}).encode(), 4),
    "shape beyond all memory": (json.dumps({"a": tensor(0, 4, [2**40, 2**40])}).encode(), 4),
    "unknown type": (json.dumps({"a": tensor(0, 4, dtype="F31")}).encode(), 4),
    "no type": (b'{"a":{"shape":[1],"data_offsets":[0,4]}}', 4),
    "three offsets": (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4,4]}}', 4),
    "a tensor that is a list": (b'{"a":[]}', 0),
    "metadata that is no text": (b'{"__metadata__":{"a":1}}', 0),
    "metadata that is a list": (b'{"__metadata__":[]}', 0),
    "not JSON": (b"{", 0),
    "a list": (b"[]", 0),
    "nothing": (b"", 0),
    "not UTF-8": (b'{"\xff":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 4),
    "UTF-16": ('{"__metadata__":{}}'.encode("utf-16"), 0),
    "a lone surrogate": (b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 4),
    "NaN": (b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', 4),
    "a huge number": (b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}', 4),
    "nested deeply": (b'{"a":' * 20_000 + b"1" + b"}" * 20_000, 0),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_headers_that_the_library_refuses_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    header, size = HOSTILE[kind]
    folder = write_raw(tmp_path / "m", header, bytes(size))
    assert not library_accepts(folder / "model.safetensors")
    with pytest.raises(ValueError, match=str(folder / "model.safetensors")):
        HFFolder(folder)


@pytest.mark.parametrize("number", ["9" * 4000, str(2**63), str(2**62)])
@pytest.mark.parametrize("place", ["shape", "data_offsets"])
def test_long_numbers_are_refused_before_they_are_multiplied(number: str, place: str) -> None:
    """A product of thousands of such numbers has millions of digits."""
    many = "[" + ",".join([number] * (2_000_000 // len(number))) + "]"
    entry = {"shape": "[1]", "data_offsets": "[0,4]", place: many}
    text = f'{{"a":{{"dtype":"F32","shape":{entry["shape"]},"data_offsets":{entry["data_offsets"]}}}}}'
    begin = time.process_time()
    with pytest.raises(ValueError, match="a has shape") as said:
        parse_header(text.encode())
    assert time.process_time() - begin < 5 and len(str(said.value)) < 400


@pytest.mark.parametrize("length", [2**40, 2**63, 2**64 - 1, MAX_HEADER_BYTES + 1, 10_000])
def test_a_header_is_not_read_for_its_length_alone(tmp_path: Path, length: int) -> None:
    folder = write_raw(tmp_path / "m", b"{}", b"", length=length)
    with pytest.raises(ValueError, match=str(folder / "model.safetensors")):
        HFFolder(folder)


def test_a_name_that_stands_twice_is_refused(tmp_path: Path) -> None:
    """The library takes the last of them."""
    entry = json.dumps(tensor(0, 4))
    folder = write_raw(tmp_path / "m", f'{{"a":{entry},"a":{entry}}}'.encode(), bytes(4))
    with pytest.raises(ValueError, match="twice"):
        HFFolder(folder)


sizes = st.integers(-2, 3) | st.sampled_from([2**31, 2**64, 1.0, True, None, "1"])
offsets = st.integers(-4, 24) | st.sampled_from([2**64, 4.0, None])
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "I64", "F8_E4M3", "F99"]),
        "shape": st.lists(sizes, max_size=2),
        "data_offsets": st.lists(offsets, min_size=1, max_size=3) | st.tuples(offsets, offsets).map(list),
    }
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    header=st.dictionaries(st.sampled_from("abcd"), entries, max_size=3),
    size=st.integers(0, 24),
    spaces=st.integers(0, 3),
)
def test_no_header_is_accepted_that_the_library_refuses(
    tmp_path: Path, header: Header, size: int, spaces: int
) -> None:
    folder = write_raw(tmp_path / "m", json.dumps(header).encode() + b" " * spaces, bytes(size))
    try:
        HFFolder(folder)
    except ValueError:
        accepted = False
    else:
        accepted = True
    assert accepted == library_accepts(folder / "model.safetensors")


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=200))
def test_parsing_ends_in_tensors_or_a_value_error(data: bytes) -> None:
    for header in (data, b"{" + data):
        try:
            parse_header(header)
        except ValueError:
            continue


tensors_of_all_kinds = st.dictionaries(
    st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
    st.tuples(
        st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8]),
        st.lists(st.integers(0, 4), max_size=3),
    ),
    max_size=5,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kinds=tensors_of_all_kinds)
def test_what_the_library_writes_is_read(
    tmp_path: Path, kinds: dict[str, tuple[torch.dtype, list[int]]]
) -> None:
    tensors = {name: torch.ones(shape).to(dtype) for name, (dtype, shape) in kinds.items()}
    (tmp_path / "m").mkdir(exist_ok=True)
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    folder = HFFolder(tmp_path / "m")
    assert folder.names() == sorted(tensors)
    for name, value in tensors.items():
        assert torch.equal(folder.read(name), value) and folder.read(name).dtype is value.dtype


def test_a_file_is_written_as_the_library_writes_it(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "model.b": torch.randn(300, 1000, generator=generator),  # two blocks
        "model.a": torch.randn(5, 3, generator=generator).bfloat16(),
        "model.ids": torch.arange(7),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 4),
    }
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    write_safetensors(tmp_path / "ours", tensors)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


# ---- reading ----------------------------------------------------------------------------------------------


def test_slices_are_those_of_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("copd_megatron.hf.folder._BUFFER_BYTES", 100)  # several pieces
    tensors: dict[str, Tensor] = {
        "matrix": torch.arange(12 * 10).reshape(12, 10).float(),
        "cube": torch.arange(3 * 4 * 5).reshape(3, 4, 5).bfloat16(),
        "vector": torch.arange(9),
        "scalar": torch.tensor(4.0),
    }
    (tmp_path / "m").mkdir()
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    folder = HFFolder(tmp_path / "m")
    for name, value in tensors.items():
        assert torch.equal(folder.read(name), value)
        for dim in range(value.ndim):
            for start, stop in ((0, value.shape[dim]), (1, 3), (2, 2), (2, 99)):
                wanted = value[(slice(None),) * dim + (slice(start, stop),)]
                assert torch.equal(folder.read(name, dim, start, stop), wanted), (name, dim, start, stop)
    with pytest.raises(KeyError, match="no tensor nothing"):
        folder.read("nothing")


@pytest.mark.parametrize("published", [True, False])
def test_experts_are_read_one_at_a_time(tmp_path: Path, published: bool) -> None:
    hidden, ffn, experts = 6, 4, 3
    gate_up, down = torch.randn(experts, hidden, 2 * ffn), torch.randn(experts, ffn, hidden)
    stored = {"x.gate_up_proj": gate_up, "x.down_proj": down}
    if not published:
        stored = {name: value.transpose(1, 2).contiguous() for name, value in stored.items()}
    (tmp_path / "m").mkdir()
    save_file(stored, tmp_path / "m" / "model.safetensors")
    folder = HFFolder(tmp_path / "m")
    for part, whole in {"gate": gate_up[1][:, :ffn], "up": gate_up[1][:, ffn:], "down": down[1]}.items():
        stack = Stack(prefix="x", num_experts=experts, hidden=hidden, ffn=ffn, part=part)
        assert torch.equal(folder.read_expert(stack, 1), whole.t()), part


# ---- which files count ------------------------------------------------------------------------------------


def sharded(folder: Path) -> Path:
    tensors = {f"t{number}": torch.full((4,), float(number)) for number in range(4)}
    return write_folder(folder, tensors, num_shards=2)


def warnings_of(caplog: pytest.LogCaptureFixture, read: Callable[[], Any]) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        read()
    return [record.getMessage() for record in caplog.records]


def test_a_stray_file_beside_an_index_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = sharded(tmp_path / "m")
    save_file({"t0": torch.full((4,), 9.0), "extra": torch.ones(1)}, folder / "zz.safetensors")
    (said,) = warnings_of(caplog, lambda: HFFolder(folder))
    assert "zz.safetensors" in said
    assert HFFolder(folder).names() == ["t0", "t1", "t2", "t3"]
    assert torch.equal(HFFolder(folder).read("t0"), torch.zeros(4))


def test_a_stray_file_beside_a_single_one_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As transformers does: shards of an earlier save, without their index."""
    folder = write_folder(tmp_path / "m", {"t": torch.zeros(4)})
    save_file({"t": torch.ones(4)}, folder / "model-00001-of-00002.safetensors")
    assert "model-00001-of-00002" in warnings_of(caplog, lambda: HFFolder(folder))[0]
    assert torch.equal(HFFolder(folder).read("t"), torch.zeros(4))


def test_two_models_in_one_folder_are_refused(tmp_path: Path) -> None:
    """transformers loads the single file, vLLM what the index names."""
    folder = sharded(tmp_path / "m")
    save_file({"t0": torch.ones(4)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="holds two models"):
        HFFolder(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(ConfigError, match=r"^model\.path: .*holds two models"):
        read_model_shape(folder)


def test_tensors_are_where_the_index_has_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = sharded(tmp_path / "m")
    first, second = sorted(folder.glob("*.safetensors"))
    stale = {**load_file(second), "t0": torch.full((4,), 9.0)}  # t0 belongs to the first file
    save_file(stale, second)
    assert "1 tensors that the index does not name there" in warnings_of(caplog, lambda: HFFolder(folder))[0]
    assert torch.equal(HFFolder(folder).read("t0"), torch.zeros(4))
    save_file({name: value for name, value in load_file(first).items() if name != "t0"}, first)
    with pytest.raises(ValueError, match="t0 is not in model-00001"):
        HFFolder(folder)


@pytest.mark.parametrize(
    "where", ["../elsewhere.safetensors", "/etc/x.safetensors", "a/b.safetensors", "config.json", 3, None]
)
def test_an_index_names_files_of_its_folder_only(tmp_path: Path, where: Any) -> None:
    folder = sharded(tmp_path / "m")
    save_file({"t0": torch.ones(4)}, tmp_path / "elsewhere.safetensors")
    index = {"weight_map": {"t0": where}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json: t0 is said to be in"):
        HFFolder(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', "[" * 100_000, "\xff\xfe"])
def test_a_damaged_index_is_named(tmp_path: Path, text: str) -> None:
    folder = sharded(tmp_path / "m")
    (folder / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        HFFolder(folder)


def test_several_files_without_an_index_are_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"2 safetensors files and no model\.safetensors\.index\.json"):
        HFFolder(folder)
    next(folder.glob("*.safetensors")).unlink()
    assert len(HFFolder(folder).names()) == 2  # one file can only be meant


def test_a_nested_configuration_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", {"t": torch.zeros(1)})
    (folder / "config.json").write_text('{"a":' * 100_000)
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        read_model_shape(folder)


# ---- what is written --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_files_have_the_usual_mode(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_safetensors(tmp_path / "model.safetensors", {"t": torch.ones(2)})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "model.safetensors").stat().st_mode) == mode


def test_an_index_is_written_where_one_is_needed(tmp_path: Path) -> None:
    companions.write_index(tmp_path, {"a": "model.safetensors"}, 4)
    assert not (tmp_path / companions.INDEX).exists()
    companions.write_index(tmp_path, {"a": "model-00001-of-00001.safetensors"}, 4)
    index = json.loads((tmp_path / companions.INDEX).read_text())
    assert index == {
        "metadata": {"total_size": 4},
        "weight_map": {"a": "model-00001-of-00001.safetensors"},
    }


@pytest.mark.parametrize("entry", [{}, tensor(0, 4, dtype="F" * 10**6), tensor(0, 4, [-1]), tensor(4, 8)])
def test_a_message_does_not_repeat_a_name_without_end(entry: dict[str, Any]) -> None:
    header = json.dumps({"n" * 10**6: entry}).encode()
    with pytest.raises(ValueError, match="nnn") as said:
        parse_header(header)
    assert len(str(said.value)) < 1000
