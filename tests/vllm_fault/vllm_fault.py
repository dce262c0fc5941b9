"""A logits processor that vLLM loads by itself, and that fails or hangs in the middle of sampling when told.

With this folder on PYTHONPATH, vLLM finds it through the entry point beside it, in every process. It leaves
the logits as they are. A file ``rank_<LOCAL_RANK>.raise`` or ``.hang`` in the folder that VLLM_FAULT_DIR
names makes the vLLM of that rank raise an exception, or never return: once, as the file is taken away.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor


class Fault(LogitsProcessor):
    """vLLM makes one for every engine."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        folder, rank = os.environ.get("VLLM_FAULT_DIR"), os.environ.get("LOCAL_RANK")
        self._file = None if folder is None else Path(folder) / f"rank_{rank}"
        self._same_requests = False

    def is_argmax_invariant(self) -> bool:
        """vLLM leaves those that are out of greedy sampling."""
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        self._same_requests = batch_update is None

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        # no request has come or gone: all have tokens, and want more
        if self._file is not None and self._same_requests:
            if _taken(self._file.with_suffix(".raise")):
                raise RuntimeError("the logits could not be processed")
            if _taken(self._file.with_suffix(".hang")):
                _never_return()
        return logits


def _taken(file: Path) -> bool:
    """Takes a file away; whether there was one."""
    try:
        file.unlink()
    except FileNotFoundError:
        return False
    return True


def _never_return() -> None:
    threading.Event().wait()
