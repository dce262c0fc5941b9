"""How a folder's tensors lie in its files. A conversion keeps it, so that a folder that goes to another
format and comes back is the same, byte for byte."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Self

import torch

from copd_megatron.hf.companions import INDEX, MAX_SMALL_BYTES, is_plain_name, read_json
from copd_megatron.hf.folder import HFFolder
from copd_megatron.hf.header import FileHeader, make_layout, parse_header
from copd_megatron.hf.tensors import TensorSpec
from copd_megatron.untrusted.regular_file import read_regular

HEADERS: Final = "safetensors.headers"
"""File in which a converted checkpoint keeps the headers of the safetensors files it came from."""


@dataclass(frozen=True, kw_only=True)
class Template:
    """The safetensors files of a folder, without their tensors."""

    layouts: tuple[FileHeader, ...]
    index: bytes | None
    """The folder's index, byte for byte; None: it has none."""

    @classmethod
    def of(cls, folder: HFFolder) -> Self:
        """How the tensors of a folder lie."""
        index = folder.folder / INDEX
        return cls(
            layouts=tuple(folder.layouts),
            index=read_regular(index, MAX_SMALL_BYTES) if index.is_file() else None,
        )

    @property
    def names(self) -> set[str]:
        """Of all tensors."""
        return {spec.name for layout in self.layouts for spec in layout.specs}

    def in_type(self, dtype: torch.dtype) -> Template:
        """The same files with all floating-point tensors in one type."""
        specs = {
            spec.name: replace(spec, dtype=dtype) if spec.dtype.is_floating_point else spec
            for layout in self.layouts
            for spec in layout.specs
        }
        return self._with(specs)

    def fitted(self, specs: Mapping[str, TensorSpec]) -> Template | None:
        """The same files for tensors whose shapes or types may be others; None: there are tensors that have
        no place in these files."""
        return self._with(specs) if self.names >= specs.keys() else None

    def _with(self, specs: Mapping[str, TensorSpec]) -> Template:
        layouts = []
        for layout in self.layouts:
            now = tuple(specs[spec.name] for spec in layout.specs if spec.name in specs)
            layouts.append(layout if now == layout.specs else make_layout(layout.name, now, layout.metadata))
        return replace(self, layouts=tuple(layout for layout in layouts if layout.specs))

    # ---- kept in a converted checkpoint ------------------------------------------------------------------

    def write_record(self, folder: Path) -> None:
        """Keeps the template in a folder, for ``read_record``."""
        record = {layout.name: base64.b64encode(layout.header).decode() for layout in self.layouts}
        (folder / HEADERS).write_text(json.dumps(record, indent=1, allow_nan=False))
        if self.index is not None:
            (folder / INDEX).write_bytes(self.index)

    @classmethod
    def read_record(cls, folder: Path) -> Self | None:
        """The template kept in a folder; None: there is none.

        Raises:
            ValueError: it is damaged, or names files outside a folder.
        """
        record = read_json(folder, HEADERS)
        if record is None:
            return None
        layouts = []
        for name, text in record.items():
            try:
                if not is_plain_name(name):
                    raise ValueError("no name of a safetensors file")
                header = base64.b64decode(text, validate=True)
                layouts.append(FileHeader(name=name, header=header, specs=parse_header(header)))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{folder / HEADERS}: {name!r}: {error}; convert the model again") from None
        index = folder / INDEX
        return cls(
            layouts=tuple(layouts), index=read_regular(index, MAX_SMALL_BYTES) if index.is_file() else None
        )
