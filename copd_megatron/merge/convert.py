"""Hugging Face to Megatron's distributed format and back, on any machine: a merge of one model.

Neither direction needs a GPU, Megatron-Core or a launcher, and neither holds more than a few blocks of a
tensor. A folder that goes to Megatron and comes back is the same, byte for byte: the files in Megatron's
format keep how the tensors lay in it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch

from copd_megatron.formats.open import Format
from copd_megatron.hf.dtypes import dtype_name
from copd_megatron.merge.engine import run_merge
from copd_megatron.merge.recipe import MergeRecipe, ModelInput

SHARD_BYTES: Final = 4 * 2**30

Progress = Callable[[str, int], None]
"""Called with the name of a tensor that is done, and its bytes; from several threads, one at a time."""


def hf_to_megatron(
    source: Path, target: Path, *, dtype: torch.dtype | None = None, progress: Progress | None = None
) -> None:
    """Writes a Hugging Face folder's weights in Megatron's distributed format.

    A Megatron job of any layout loads the result; ``megatron_to_hf`` turns it back.

    Args:
        source: Hugging Face folder of a supported architecture.
        target: must not exist; appears under its name only when it is complete.
        dtype: convert to this type; None: keep each tensor's.

    Raises:
        FileNotFoundError, ValueError: the folder lacks tensors, has more than its config.json says, or holds
            fused tensors of different types.
        FileExistsError: there is something at ``target``.
        OSError: the disk is full; what is finished stays for the next start.
    """
    _convert(source, target, "megatron", dtype, SHARD_BYTES, None, progress)


def megatron_to_hf(
    source: Path,
    target: Path,
    *,
    model_path: Path | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Writes a checkpoint's weights as a Hugging Face folder, with configuration, tokenizer and processor.

    Tensors are laid out over files as in the folder that the model came from, where that is known.

    Args:
        source: a converted folder, a branch's folder of a joint checkpoint, or a joint checkpoint with one
            trained branch.
        target: must not exist; appears under its name only when it is complete.
        model_path: Hugging Face folder with configuration and tokenizer; None: as the checkpoint knows it.
        dtype: convert to this type; None: keep each tensor's.
        shard_bytes: largest file where no folder gives the layout.

    Raises:
        FileNotFoundError, CheckpointError: the checkpoint is damaged, or its model's folder is gone.
        FileExistsError: there is something at ``target``.
        OSError: the disk is full; what is finished stays for the next start.
    """
    _convert(source, target, "hf", dtype, shard_bytes, model_path, progress)


def _convert(
    source: Path,
    target: Path,
    output_format: Format,
    dtype: torch.dtype | None,
    shard_bytes: int,
    model_path: Path | None,
    progress: Progress | None,
) -> None:
    recipe = MergeRecipe(
        method="passthrough",
        models=(ModelInput(path=str(source)),),
        out_dtype=None if dtype is None else dtype_name(dtype),
    )
    run_merge(
        recipe,
        target,
        shard_bytes=shard_bytes,
        allow_nan=True,
        output_format=output_format,
        keep_files=True,
        model_path=model_path,
        progress_of_tensors=progress,
    )
