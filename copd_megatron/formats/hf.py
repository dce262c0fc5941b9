"""Hugging Face folders as source and sink: safetensors read and written in place, range by range."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from copd_megatron.hf.companions import INDEX, write_index
from copd_megatron.hf.folder import HFFolder
from copd_megatron.hf.header import plan_files
from copd_megatron.hf.planned_file import PlannedFile, PlannedFileWriter, planned_safetensors
from copd_megatron.hf.template import Template
from copd_megatron.hf.tensors import TensorSpec


class HFSource(HFFolder):
    """A Hugging Face folder as a ``TensorSource``."""

    dims = None

    @property
    def label(self) -> str:
        return str(self.folder)

    @property
    def companions(self) -> Path:
        return self.folder

    @cached_property
    def template(self) -> Template:
        return Template.of(self)

    def problems(self) -> list[str]:
        return []


class HFSink:
    """A Hugging Face folder's weights, written file by file.

    Args:
        folder: exists; several processes may write different files of it.
        template: the files to write.
        fsync: a file is closed only when the disk has it.
    """

    def __init__(self, folder: Path, template: Template, *, fsync: bool = False) -> None:
        self.folder, self._template, self._fsync = folder, template, fsync

    @classmethod
    def of(
        cls, folder: Path, specs: Sequence[TensorSpec], shard_bytes: int, *, fsync: bool = False
    ) -> HFSink:
        """A sink of files of at most ``shard_bytes`` (or one larger tensor), tensors in the order given."""
        layouts = tuple(plan_files(specs, shard_bytes))
        return cls(folder, Template(layouts=layouts, index=None), fsync=fsync)

    @property
    def shards(self) -> list[tuple[TensorSpec, ...]]:
        return [layout.specs for layout in self._template.layouts]

    @property
    def companions(self) -> Path:
        return self.folder

    def open(self, index: int) -> PlannedFileWriter:
        return PlannedFileWriter(self._plan(index), fsync=self._fsync)

    def digest(self, index: int) -> str | None:
        return self._plan(index).digest()

    def finish(self) -> None:
        layouts = self._template.layouts
        where = {spec.name: layout.name for layout in layouts for spec in layout.specs}
        total = sum(spec.num_bytes for layout in layouts for spec in layout.specs)
        index = self._template.index
        if index is not None and _says(index, where, total):
            (self.folder / INDEX).write_bytes(index)
        else:
            write_index(self.folder, where, total)

    def _plan(self, index: int) -> PlannedFile:
        return planned_safetensors(self.folder, self._template.layouts[index])


def _says(index: bytes, where: dict[str, str], total: int) -> bool:
    """Whether an index says of these files what is in them."""
    content = json.loads(index)
    metadata = content.get("metadata")
    told = metadata.get("total_size", total) if isinstance(metadata, dict) else total
    return bool(content.get("weight_map") == where and told == total)
