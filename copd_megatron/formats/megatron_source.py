"""A folder in Megatron's distributed format as a source of Hugging Face tensors: a branch of a joint
checkpoint, or a converted model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from copd_megatron.checkpoint.manifest import (
    MANIFEST,
    CheckpointError,
    Manifest,
    hash_problems,
    read_manifest,
    size_problems,
)
from copd_megatron.formats.megatron_reader import MegatronTensors, find_folder
from copd_megatron.hf.folder import HFFolder
from copd_megatron.hf.model_config import read_sizes
from copd_megatron.hf.template import Template
from copd_megatron.hf.tensors import TensorSpec
from copd_megatron.model.places import TensorPlace, places
from copd_megatron.model.shape import ModelShape, shape_from_record
from copd_megatron.model.slots import tied_copy

HF_FILES: Final = "hf"
"""Folder in a converted checkpoint with the Hugging Face folder's other files."""


class MegatronSource:
    """A folder's tensors under Hugging Face names, every expert's by itself. Safe to use from several
    threads."""

    def __init__(self, path: Path, *, model_path: Path | None = None) -> None:
        """
        Args:
            path: a branch's folder of a joint checkpoint, a converted folder, or a joint checkpoint with one
                trained branch.
            model_path: Hugging Face folder with configuration and tokenizer; None: as the checkpoint knows
                it.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            CheckpointError: it is damaged or unfinished, has several branches, or does not say what model
                it holds.
        """
        self._folder = find_folder(path)
        self._tensors = MegatronTensors(self._folder)
        self._manifest = _manifest_of(self._folder)
        if self._manifest and (problems := size_problems(self._folder.parent, self._manifest)):
            raise CheckpointError(f"{'; '.join(problems)}; use an older checkpoint")
        dims, companions = _model_of(self._folder, self._manifest)
        self.companions = model_path or companions
        self.dims = read_sizes(model_path) if model_path is not None else dims
        if self.dims is None:
            raise CheckpointError(
                f"{self._folder} does not say what model it holds: there is neither {MANIFEST} in the folder "
                f"above nor {HF_FILES}/config.json in it; give the Hugging Face folder of the model"
            )
        self._places = self._locate(self.dims)
        self._alias = self._stored_copies(self.dims)

    @property
    def label(self) -> str:
        return str(self._folder)

    @cached_property
    def template(self) -> Template | None:
        """As the converted folder records it, or as it is in the folder of the model."""
        if (record := Template.read_record(self._folder / HF_FILES)) is not None:
            return record
        if self.companions is None or not any(self.companions.glob("*.safetensors")):
            return None
        return Template.of(HFFolder(self.companions))

    def names(self) -> Sequence[str]:
        return sorted([*self._places, *self._alias])

    def spec(self, name: str) -> TensorSpec:
        place = self._place(name)
        return TensorSpec(name, place.shape, self._tensors.info[place.key].dtype)

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Fills ``out`` (1-D, contiguous, of the tensor's type) with elements [start, start + len(out)).

        Raises:
            KeyError: no such tensor.
            CheckpointError, OSError: the checkpoint is damaged or cannot be read.
        """
        place = self._place(name)
        width = max(math.prod(place.shape[1:]), 1)
        stop = start + out.numel()
        first, last = start // width, -(-stop // width)
        if start % width == 0 and stop % width == 0:
            self._read_rows(place, first, last, out.view(last - first, width))
            return
        rows = torch.empty(last - first, width, dtype=out.dtype)
        self._read_rows(place, first, last, rows)
        out.copy_(rows.view(-1)[start - first * width : stop - first * width])

    def identity(self) -> str:
        return self._tensors.identity()

    def problems(self) -> list[str]:
        return hash_problems(self._folder.parent, self._manifest) if self._manifest else []

    def _place(self, name: str) -> TensorPlace:
        return self._places[self._alias.get(name, name)]

    def _read_rows(self, place: TensorPlace, first: int, last: int, out: Tensor) -> None:
        """Rows [first, last) of a Hugging Face tensor into ``out`` [last - first, width]."""
        done = 0
        for start, stop in place.rows_between(first, last):
            self._tensors.read_rows(place.key, place.at, start, out[done : done + stop - start])
            done += stop - start

    def _locate(self, dims: ModelShape) -> dict[str, TensorPlace]:
        found = places(dims)
        if missing := [name for name, place in found.items() if place.key not in self._tensors.info]:
            raise CheckpointError(
                f"{self._folder} lacks {len(missing)} of {len(found)} tensors, {missing[0]} for one: it "
                "holds another architecture"
            )
        return found

    def _stored_copies(self, dims: ModelShape) -> dict[str, str]:
        """Tied tensors that Megatron keeps once but the model's Hugging Face folder stores twice: the copy,
        and what it is a copy of."""
        tied = tied_copy(dims)
        if not tied or self.template is None:
            return {}
        return {name: original for name, original in tied.items() if name in self.template.names}


def _manifest_of(folder: Path) -> Manifest | None:
    """The joint checkpoint's manifest, cut down to this branch; None for a converted folder."""
    if not (folder.parent / MANIFEST).is_file():
        return None
    manifest = read_manifest(folder.parent)
    branches = {name: entry for name, entry in manifest.branches.items() if name == folder.name}
    return replace(manifest, branches=branches)


def _model_of(folder: Path, manifest: Manifest | None) -> tuple[ModelShape | None, Path | None]:
    """Sizes of the model, and a folder with its configuration and tokenizer, as far as the checkpoint
    knows."""
    if (folder / HF_FILES / "config.json").is_file():
        return read_sizes(folder / HF_FILES), folder / HF_FILES
    entry = manifest.branches.get(folder.name) if manifest is not None else None
    if entry is None:
        return None, None
    source = Path(entry.model_path)
    try:
        is_model = (source / "config.json").is_file()  # else a received manifest would have any folder read
        return shape_from_record(entry.dims), source if is_model else None
    except TypeError as error:
        raise CheckpointError(
            f"{folder.parent / MANIFEST}: the sizes of {folder.name} are not those of a model ({error}); use "
            "the version that wrote it"
        ) from error
