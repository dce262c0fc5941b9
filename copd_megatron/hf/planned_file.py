"""Files whose every byte has its place before the first is written: written out of order, checked by block.

Shapes and types are known beforehand. What frames the values (a header, the archives around tensors in other
formats) is written when a file is opened, and every block then goes straight to its place, from any thread.
"""

from __future__ import annotations

import hashlib
import os
import threading
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from torch import Tensor

from copd_megatron.hf.header import FileHeader, library_layout
from copd_megatron.hf.tensors import BLOCK_ELEMENTS, TensorSpec, block_range, bytes_of
from copd_megatron.untrusted.regular_file import open_regular

Extent = tuple[int, int]
"""First byte in the file, and number of bytes."""

_MODE: Final = 0o644
"""Of every file written, minus the process's umask."""


class Extents(Protocol):
    """Where in a file the elements [start, stop) of a tensor lie, in order."""

    def __call__(self, name: str, start: int, stop: int) -> Sequence[Extent]: ...


@dataclass(frozen=True, kw_only=True)
class PlannedFile:
    """One file to be written."""

    path: Path
    frame: tuple[tuple[int, bytes], ...]
    """What stands there whatever the values are: position and bytes."""
    specs: tuple[TensorSpec, ...]
    """Tensors with values in the file."""
    extents: Extents
    num_bytes: int

    def digest(self) -> str | None:
        """The digest of the file as it is on the disk; None: it is not there, or not as planned."""
        if not self.path.is_file() or self.path.stat().st_size != self.num_bytes:
            return None
        sums: dict[tuple[str, int], int] = {}
        with open_regular(self.path, buffered=False) as file:
            for position, frame in self.frame:
                if os.pread(file.fileno(), len(frame), position) != frame:
                    return None
            for spec in self.specs:
                for block in range(spec.num_blocks):
                    checksum = 0
                    for position, length in self.extents(spec.name, *block_range(spec, block)):
                        checksum = zlib.crc32(os.pread(file.fileno(), length, position), checksum)
                    sums[spec.name, block] = checksum
        return self.seal(sums)

    def seal(self, sums: Mapping[tuple[str, int], int]) -> str:
        """SHA-256 over the frame and the blocks' CRC-32s in order. Blocks are written out of order by several
        threads, so the file cannot be hashed as one stream; and CRC-32 runs at memory speed."""
        digest = hashlib.sha256()
        for _, frame in self.frame:
            digest.update(frame)
        for spec in self.specs:
            for block in range(spec.num_blocks):
                digest.update(sums[spec.name, block].to_bytes(4, "little"))
        return digest.hexdigest()


class PlannedFileWriter:
    """Writes one file: the frame first, then every block at its place, each with a CRC-32.

    Raises:
        OSError: the disk has no room for the whole file; said when it is opened, not after hours.
    """

    def __init__(self, plan: PlannedFile, *, fsync: bool = False) -> None:
        """
        Args:
            fsync: ``close`` waits until the disk has the file.
        """
        self._plan, self._fsync = plan, fsync
        self._descriptor = os.open(plan.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, _MODE)
        try:
            os.posix_fallocate(self._descriptor, 0, max(plan.num_bytes, 1))
            for position, frame in plan.frame:
                self._write_at(position, memoryview(frame))
        except OSError:
            os.close(self._descriptor)
            raise
        self._sums: dict[tuple[str, int], int] = {}
        self._lock = threading.Lock()

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Puts ``values`` (1-D, of the tensor's type, one block) at elements [start, ...)."""
        view, done = bytes_of(values), 0
        for position, length in self._plan.extents(name, start, start + values.numel()):
            self._write_at(position, view[done : done + length])
            done += length
        checksum = zlib.crc32(view)
        with self._lock:
            self._sums[name, start // BLOCK_ELEMENTS] = checksum

    def close(self) -> str:
        """Ends the file once all is written; returns its digest."""
        if self._fsync:
            os.fsync(self._descriptor)
        os.close(self._descriptor)
        return self._plan.seal(self._sums)

    def abort(self) -> None:
        """Lets go of the file without finishing it."""
        os.close(self._descriptor)

    def _write_at(self, position: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            done += os.pwrite(self._descriptor, view[done:], position + done)


def planned_safetensors(folder: Path, layout: FileHeader) -> PlannedFile:
    """A safetensors file of that layout in a folder."""
    begins = layout.begins
    sizes = {spec.name: spec.dtype.itemsize for spec in layout.specs}

    def extents(name: str, start: int, stop: int) -> list[Extent]:
        return [(begins[name] + start * sizes[name], (stop - start) * sizes[name])]

    return PlannedFile(
        path=folder / layout.name,
        frame=((0, layout.preamble),),
        specs=layout.specs,
        extents=extents,
        num_bytes=layout.num_bytes,
    )


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors (contiguous, on the CPU) into one file, byte for byte as the safetensors library does.

    Raises:
        OSError: the disk is full.
    """
    specs = [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    writer = PlannedFileWriter(planned_safetensors(path.parent, library_layout(path.name, specs)))
    try:
        for spec in specs:
            values = tensors[spec.name].view(-1)
            for block in range(spec.num_blocks):
                start, stop = block_range(spec, block)
                writer.write(spec.name, start, values[start:stop])
    except BaseException:
        writer.abort()
        raise
    writer.close()
