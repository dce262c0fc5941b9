"""Profiler windows: torch's profiler and CUDA memory snapshots for chosen steps and ranks."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from copd_megatron.config.schema import ProfilingConfig
from copd_megatron.errors import ConfigError
from copd_megatron.metrics.rank_log import RankPlace

logger = logging.getLogger(__name__)

FOLDER = "profile"
_MAX_MEMORY_EVENTS = 200_000


class ProfilerWindow:
    """Records from the start of step ``profiling.step_start`` to the end of ``profiling.step_end``, on the
    ranks in ``profiling.ranks``. Call ``begin`` and ``end`` around every step, on every rank."""

    def __init__(self, options: ProfilingConfig, run_dir: Path, place: RankPlace, *, cuda: bool) -> None:
        """
        Raises:
            ConfigError: a memory snapshot is requested, but the actors run on CPUs.
        """
        if options.memory_snapshot and not cuda:
            raise ConfigError(
                "profiling.memory_snapshot: it records CUDA's allocator, but the actors run on the CPU; set "
                "it to false (profiling.torch_profiler works on CPUs)"
            )
        self._options, self._folder, self._cuda = options, run_dir / FOLDER, cuda
        self._name = f"{place.branch}_rank_{place.rank:05d}"
        self._chosen = not options.ranks or place.rank in options.ranks
        self._profile: Any = None
        self._since = 0
        """First step of the open window; 0 if none is open."""

    def begin(self, step: int) -> None:
        """Called when step 1, 2, ... begins. A run that resumes inside the window records the rest of it."""
        options = self._options
        wanted = self._chosen and (options.torch_profiler or options.memory_snapshot)
        if not wanted or self._since or not options.step_start <= step <= options.step_end:
            return
        self._since = step
        self._folder.mkdir(parents=True, exist_ok=True)
        if options.memory_snapshot:
            torch.cuda.memory._record_memory_history(max_entries=_MAX_MEMORY_EVENTS)
        if options.torch_profiler:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self._cuda:
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profile = torch.profiler.profile(
                activities=activities, record_shapes=options.record_shapes, with_stack=options.with_stack
            )
            self._profile.start()

    def end(self, step: int) -> None:
        """Called when a step has ended."""
        if self._since and step >= self._options.step_end:
            self._write_if_possible(step)

    def close(self) -> None:
        """Writes a window that is still open at the end of the run."""
        if self._since:
            self._write_if_possible(self._options.step_end)

    def _write_if_possible(self, last: int) -> None:
        try:
            self._write(last)
        except OSError as error:
            logger.warning("the profile is not written to %s: %s; the run goes on", self._folder, error)
            self._since = 0

    def _write(self, last: int) -> None:
        stem = f"{self._name}_steps_{self._since}-{last}"
        if self._profile is not None:
            self._profile.stop()
            path = self._folder / f"{stem}.trace.json.gz"
            self._profile.export_chrome_trace(str(path))
            self._profile = None
            logger.info("profile: wrote %s; open it at https://ui.perfetto.dev", path)
        if self._options.memory_snapshot:
            path = self._folder / f"{stem}.memory.pickle"
            torch.cuda.memory._dump_snapshot(str(path))
            torch.cuda.memory._record_memory_history(enabled=None)
            logger.info("profile: wrote %s; open it at https://pytorch.org/memory_viz", path)
        self._since = 0
