"""How a rank writes its share of a checkpoint: one file, hashed as it is written, synced at the end.

Megatron plans which rank writes what (``MCoreSavePlanner``). Its own writer passes results through a manager
process that it spawns, or forks the process that holds vLLM. This one writes in the calling thread or in a
thread of its own: the slow parts (copying bytes, hashing, the disk) run outside Python's interpreter lock,
and a process that is killed leaves no child behind.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem

from copd_megatron.checkpoint.distcp import HashingFile, append
from copd_megatron.checkpoint.manifest import FileEntry
from copd_megatron.topology.messages import register

# what the plan of a save is told in, between the ranks of a branch
register(MetadataIndex)
register(_StorageInfo)


@register
@dataclass(kw_only=True)
class Written:
    """What one rank wrote."""

    places: list[tuple[MetadataIndex, _StorageInfo]] = field(default_factory=list)
    """Where each item lies."""
    files: list[FileEntry] = field(default_factory=list)
    error: str | None = None
    """Why it failed; None: everything is on the disk."""


class RankWriter:
    """Writes one rank's items into ``__<rank>_0.distcp``. It has as much of the storage writer interface of
    ``torch.distributed.checkpoint`` as Megatron's planning uses."""

    can_run_decentralized_global_plan = True

    def __init__(self, folder: Path, *, copy: bool) -> None:
        """
        Args:
            copy: keep copies of the tensors, so that they may change before they are written.
        """
        self.folder, self.copy = folder, copy
        self.metadata: Metadata | None = None
        """The plan of the whole branch, on its first rank."""
        self._items: list[tuple[WriteItem, Any]] = []
        self._written = Written()
        self._thread: threading.Thread | None = None
        self._raised: Exception | None = None

    # ---- planning, called by Megatron ------------------------------------------------------------------

    def set_up_storage_writer(self, is_coordinator: bool) -> None:
        """Nothing to prepare: the folder is there."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan as it is."""
        return plan

    def prepare_decentralized_global_plan(self, plan: SavePlan) -> SavePlan:
        """The plan as it is: a rank's file is named after its rank."""
        return plan

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        """Keeps references to (or copies of) the tensors to write."""
        for item in plan.items:
            data = planner.resolve_data(item)
            # the optimizer's tensors were gathered for this save and are nobody else's
            shared = not item.index.fqn.startswith("optimizer.state.")
            if self.copy and shared and isinstance(data, torch.Tensor):
                data = data.detach().to("cpu", copy=True)
            self._items.append((item, data))

    # ---- writing -----------------------------------------------------------------------------------------

    def write(self) -> None:
        """Writes everything. A failure is kept for ``result``, since the other ranks must learn of it."""
        if not self._items:
            return
        name = f"__{dist.get_rank()}_0.distcp"
        try:
            self._written = self._write(name)
        except OSError as error:
            self._written = Written(error=f"{self.folder / name}: {error.strerror or error}")
        finally:
            self._items = []

    def start(self) -> None:
        """``write`` in a thread."""
        self._thread = threading.Thread(target=self._write_in_thread, name="copd-checkpoint", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether ``result`` would return at once."""
        return self._thread is None or not self._thread.is_alive()

    def result(self) -> Written:
        """What was written. Waits for the thread, and raises what it raised."""
        if self._thread is not None:
            self._thread.join()
        if self._raised is not None:
            raise self._raised
        return self._written

    def _write_in_thread(self) -> None:
        try:
            self.write()
        except (
            Exception
        ) as error:  # for result(): else a checkpoint that lacks this part would pass for whole
            self._raised = error

    def _write(self, name: str) -> Written:
        stream = HashingFile(self.folder / name)
        places = []
        for item, data in self._items:
            place = append(stream, data, name)
            places.append((item.index, place))
            if stream.failed:
                break
        size, digest = stream.finish()
        entry = FileEntry(path=f"{self.folder.name}/{name}", num_bytes=size, sha256=digest)
        return Written(places=places, files=[entry])


class SaveStrategy(TorchDistSaveShardedStrategy):
    """Megatron's planning with ``RankWriter`` as the writer, which ``writer`` holds after the planning."""

    def __init__(self, *, copy: bool) -> None:
        super().__init__()
        self.copy = copy
        self.writer: RankWriter | None = None

    def async_save(
        self, sharded_state_dict: Any, checkpoint_dir: Any, async_strategy: str = "mcore"
    ) -> AsyncRequest:
        """Plans only; the request that Megatron expects is empty."""
        translated, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        self.writer = RankWriter(Path(checkpoint_dir), copy=self.copy)
        (_, self.writer.metadata, _), *_ = save_state_dict_async_plan(
            mcore_to_pyt_state_dict(translated, False),
            self.writer,
            None,
            0,
            planner=MCoreSavePlanner(
                dedup_replicated_tensors=False, flatten_state_dict=False, flatten_sharded_tensors=False
            ),
        )
        return AsyncRequest(None, (), [])
