"""Branches in Megatron's distributed format as inputs of a merge: joint checkpoints and converted folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from copd_megatron.checkpoint.folder import MegatronFolder, is_megatron_folder
from copd_megatron.merge.tensors import TensorSpec, register_format


class MegatronSource:
    """A branch's folder under Hugging Face names, read range by range; safe for several threads."""

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError: the folder is damaged, or does not say what model it holds."""
        self._folder = MegatronFolder(folder)
        self.label = self._folder.label
        self.companions: Path | None = self._folder.companions

    def names(self) -> Sequence[str]:
        return self._folder.names()

    def spec(self, name: str) -> TensorSpec:
        return TensorSpec(name, self._folder.shape(name), self._folder.dtype(name))

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        self._folder.read_into(name, start, out)

    def identity(self) -> str:
        return self._folder.identity()


def _open(path: Path) -> MegatronSource | None:
    return MegatronSource(path) if is_megatron_folder(path) else None


register_format(_open)
