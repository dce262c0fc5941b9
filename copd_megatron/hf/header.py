"""Safetensors headers: checked as strictly as the safetensors library checks them, and made.

A safetensors file is eight bytes of header length, a JSON header with every tensor's type, shape and byte
range, and the tensors' bytes, without gaps. The library is not used, because it does not tell where a
tensor's bytes begin: reading ranges without mapping the file, and writing blocks in place, need that.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from copd_megatron.hf.companions import shard_name
from copd_megatron.hf.dtypes import CODES, DTYPES
from copd_megatron.hf.tensors import TensorSpec, cut

MAX_HEADER_BYTES: Final = 100_000_000
"""As in the safetensors library: a longer header is damage, or an attack on the reader's memory."""
_MAX_SIZE: Final = 2**63 - 1
"""Of a dimension, an offset and a tensor: no file holds more, and longer numbers take longer to multiply."""
_METADATA = "__metadata__"
_LENGTH_BYTES = 8
_SHOWN_CHARACTERS: Final = 200


@dataclass(frozen=True, kw_only=True)
class FileHeader:
    """One safetensors file: its header, byte for byte, and its tensors in the order of their bytes."""

    name: str
    header: bytes
    specs: tuple[TensorSpec, ...]

    @property
    def preamble(self) -> bytes:
        """The file's bytes before the first tensor's."""
        return len(self.header).to_bytes(_LENGTH_BYTES, "little") + self.header

    @property
    def begins(self) -> dict[str, int]:
        """Where in the file each tensor's bytes begin."""
        found, position = {}, _LENGTH_BYTES + len(self.header)
        for spec in self.specs:
            found[spec.name] = position
            position += spec.num_bytes
        return found

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return _LENGTH_BYTES + len(self.header) + sum(spec.num_bytes for spec in self.specs)

    @property
    def metadata(self) -> dict[str, str]:
        """The texts that the file carries beside its tensors."""
        return json.loads(self.header).get(_METADATA) or {}


def read_layout(path: Path, descriptor: int) -> FileHeader:
    """An open file's layout, from its header alone.

    Raises:
        ValueError: it is no safetensors file, or torn; names the file.
    """
    size = os.fstat(descriptor).st_size
    length = int.from_bytes(os.pread(descriptor, _LENGTH_BYTES, 0), "little")
    try:
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"a header of {length} bytes, where {MAX_HEADER_BYTES} is the limit")
        header = os.pread(descriptor, length, _LENGTH_BYTES)
        if size < _LENGTH_BYTES or len(header) != length:
            raise ValueError("it is torn inside the header")
        layout = FileHeader(name=path.name, header=header, specs=parse_header(header))
        if size != layout.num_bytes:
            raise ValueError(
                f"it has {size} bytes, its header says {layout.num_bytes}"
                + (": it is truncated" if size < layout.num_bytes else "")
            )
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}; copy it again") from None
    return layout


def parse_header(header: bytes) -> tuple[TensorSpec, ...]:
    """The tensors of a header in the order of their bytes.

    Raises:
        ValueError: it is not JSON of the right form, or the tensors' bytes overlap or leave a gap.
    """
    found = [_entry(name, entry) for name, entry in _load(header).items() if name != _METADATA]
    position = 0
    for begin, end, spec in sorted(found, key=lambda item: item[:2]):
        if begin != position or end - begin != spec.num_bytes:
            raise ValueError(
                f"{_short(spec.name)} has bytes {begin} to {end}, where {position} to "
                f"{position + spec.num_bytes} should be"
            )
        position = end
    return tuple(spec for _, _, spec in sorted(found, key=lambda item: item[:2]))


def _load(header: bytes) -> dict[str, Any]:
    try:
        content = json.loads(header.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("the header is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("the header is no mapping")
    metadata = content.get(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{_METADATA} is not a mapping of texts")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a name stands in the header twice")
    for name in content:
        name.encode("utf-8")  # a lone surrogate is JSON to Python alone
    return content


def _no_number(text: str) -> None:
    raise ValueError(f"{text} in the header")


def _entry(name: str, entry: Any) -> tuple[int, int, TensorSpec]:
    """First byte, byte after the last, and what the tensor is."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError(f"{_short(name)} lacks dtype, shape or data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise ValueError(f"{_short(name)} has type {code!r:.40}, known are {', '.join(DTYPES)}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{_short(name)} has shape {shape!r:.80} and data_offsets {offsets!r:.80}")
    if not _is_storable(shape, DTYPES[code].itemsize):
        raise ValueError(f"{_short(name)} has shape {shape!r:.80}, more than any file holds")
    return offsets[0], offsets[1], TensorSpec(name, tuple(shape), DTYPES[code])


def _short(name: str) -> str:
    """A name for a message: a file's may have millions of characters."""
    return name if len(name) <= _SHOWN_CHARACTERS else f"{name[:_SHOWN_CHARACTERS]}..."


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value <= _MAX_SIZE for value in values
    )


def _is_storable(shape: Sequence[int], itemsize: int) -> bool:
    """Whether no product of the first dimensions overflows, as the safetensors library has it."""
    total = itemsize
    for size in shape:
        total *= size
        if total > _MAX_SIZE:
            return False
    return True


# ---- making ----------------------------------------------------------------------------------------------


def make_layout(name: str, specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> FileHeader:
    """A file with these tensors in this order."""
    header: dict[str, Any] = {_METADATA: dict(metadata)}
    begin = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [begin, begin + spec.num_bytes],
        }
        begin += spec.num_bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    return FileHeader(name=name, header=text + b" " * (-len(text) % 8), specs=tuple(specs))


def library_layout(name: str, specs: Sequence[TensorSpec]) -> FileHeader:
    """A file as the safetensors library writes it: wider types first, so that all are aligned."""
    ordered = sorted(specs, key=lambda spec: (-spec.dtype.itemsize, spec.name))
    return make_layout(name, ordered, {"format": "pt"})


def plan_files(specs: Sequence[TensorSpec], shard_bytes: int) -> list[FileHeader]:
    """Files for tensors in the order given, each of at most ``shard_bytes`` (or one larger tensor), under
    Hugging Face's names."""
    shards = cut(specs, shard_bytes, lambda spec: spec.num_bytes)
    return [
        library_layout(shard_name(number, len(shards)), shard) for number, shard in enumerate(shards, start=1)
    ]
