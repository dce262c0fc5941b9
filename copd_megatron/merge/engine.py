"""Merges models straight from file to file: block by block, on several threads, processes and ranks.

Memory. A thread holds one block (2^18 elements) of every input and a few float32 blocks of intermediates,
about two MiB per input and ten besides; nothing grows with the model, the tensor or the shard. Methods that
must see a whole tensor before its first element is known (TIES' threshold, DARE's norm, slerp's angle) read
it again instead of keeping it.

Work. Shards are dealt to ranks and processes; within a process, large tensors are split over threads block
by block and small ones dealt out whole. The result does not depend on any of that.

Safety. All goes to ``<target>.partial``; a journal there lists the finished shards with their digests. The
same merge started again verifies and keeps them. The folder is renamed when it is complete.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from copd_megatron.checkpoint.manifest import CheckpointError
from copd_megatron.formats.open import Format, make_sink, open_source
from copd_megatron.formats.tensors import (
    BLOCK_ELEMENTS,
    DTYPE_NAMES,
    ShardWriter,
    TensorSink,
    TensorSource,
    TensorSpec,
    block_range,
)
from copd_megatron.hf.companions import copy_companions, set_dtype
from copd_megatron.merge.check import check_mergeable
from copd_megatron.merge.journal import Journal
from copd_megatron.merge.methods import Settings, start
from copd_megatron.merge.recipe import Recipe, layer_depths
from copd_megatron.merge.scratch import scratch

logger = logging.getLogger(__name__)

SHARD_BYTES = 2 * 2**30
_MAX_THREADS = 16
_Runner = Callable[[Callable[[Any], None], Iterable[Any]], Iterable[None]]
Advance = Callable[[int, int], None]
"""Told of progress: bytes of the result that are done now, and how many this rank has to do."""


@dataclass(frozen=True, kw_only=True)
class MergeJob:
    """All that a worker process needs to do its part."""

    recipe: Recipe
    folder: Path
    """The unfinished result."""
    shard_bytes: int = SHARD_BYTES
    allow: tuple[str, ...] = ()
    """Configuration keys that may differ between the models."""
    fsync: bool = False
    output_format: Format = "hf"


@dataclass(frozen=True, kw_only=True)
class Team:
    """The threads that share a shard's work."""

    size: int
    pool: ThreadPoolExecutor | None = None
    """None: the calling thread alone."""


@dataclass(frozen=True, kw_only=True)
class MergeOutcome:
    """What a merge did, on this rank."""

    num_tensors: int
    num_bytes: int
    """Of the whole result."""
    merged_shards: int
    kept_shards: int
    """Finished by an earlier, interrupted run."""
    seconds: float


class Merger:
    """An opened job: its inputs, and the plan of the result.

    Raises:
        FileNotFoundError: an input is not there, or the configuration that belongs to all of them.
        CheckpointError: an input is damaged.
        MismatchError: the inputs cannot be merged.
        ConfigError: a parameter lacks a value for some tensor, or the format cannot hold the model.
    """

    def __init__(self, job: MergeJob) -> None:
        self.job = job
        self.sources: list[TensorSource] = [open_source(path) for path in job.recipe.inputs]
        check_mergeable(self.sources, allow=job.allow)
        names = self.sources[0].names()
        self._depths = layer_depths(names)
        self._settings = {name: self._resolve(name) for name in names}
        specs = [self._out_spec(name) for name in names]
        self.companions = self._find_companions()
        self.sink: TensorSink = make_sink(
            job.output_format,
            job.folder,
            specs,
            job.shard_bytes,
            dims=next((source.dims for source in self.sources if source.dims), None),
            companions=self.companions,
            fsync=job.fsync,
        )

    def _find_companions(self) -> Path:
        """Folder whose configuration and tokenizer the result gets: the one asked for, or any (a branch in
        Megatron's format knows its model's folder, which may be gone)."""
        chosen = self.sources[self.job.recipe.companion_index()]
        for source in (chosen, *self.sources):
            if source.companions is not None:
                return source.companions
        raise FileNotFoundError(
            f"merge: the Hugging Face folder that {chosen.label} was trained from is gone, and no other "
            "input has configuration and tokenizer; put it back, or convert one input with "
            "tools/convert_megatron_to_hf.py --model FOLDER first"
        )

    def _resolve(self, name: str) -> Settings:
        recipe = self.job.recipe
        found = recipe.resolve(name, self._depths[name])
        settings = Settings(
            weights=found.weights,
            densities=found.densities,
            normalize=bool(found.shared.get("normalize", False)),
            rescale=bool(found.shared.get("rescale", False)),
            scale=float(found.shared.get("lambda", 1.0)),
            t=float(found.shared.get("t", 0.0)),
            seed=recipe.seed,
            arithmetic=DTYPE_NAMES[recipe.arithmetic] if recipe.arithmetic else None,
        )
        spec = self._working_spec(name)
        if spec.dtype.is_floating_point:
            start(recipe.method, TensorSpec(name, (0,), spec.dtype), settings)  # refuses what cannot be
        return settings

    def _working_spec(self, name: str) -> TensorSpec:
        """The tensor in the type that all inputs are brought to."""
        spec = self.sources[0].spec(name)
        dtype = spec.dtype
        if dtype.is_floating_point and self.job.recipe.dtype:
            dtype = DTYPE_NAMES[self.job.recipe.dtype]
        elif dtype.is_floating_point:
            for source in self.sources[1:]:
                if source.spec(name).dtype != dtype:
                    dtype = torch.promote_types(dtype, source.spec(name).dtype)
        return TensorSpec(name, spec.shape, dtype)

    def _out_spec(self, name: str) -> TensorSpec:
        working, wanted = self._working_spec(name), self.job.recipe.out_dtype
        if wanted == "first":
            return self.sources[0].spec(name)
        if wanted is None or not working.dtype.is_floating_point:
            return working
        return TensorSpec(name, working.shape, DTYPE_NAMES[wanted])

    def fingerprint(self) -> str:
        """What the result depends on: recipe, inputs, cut into shards."""
        recipe = {key: value for key, value in asdict(self.job.recipe).items() if key != "origin"}
        inputs = [source.identity() for source in self.sources]
        cut = [self.job.output_format, self.job.shard_bytes, BLOCK_ELEMENTS]
        text = json.dumps([recipe, inputs, *cut], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def shard_bytes(self, index: int) -> int:
        """Size of a shard's tensors."""
        return sum(spec.num_bytes for spec in self.sink.shards[index])

    def merge_shard(self, index: int, team: Team, advance: Callable[[int], None]) -> str:
        """Writes one shard; returns its digest.

        Args:
            advance: told of finished bytes, from any thread.
        """
        runner: _Runner = map if team.pool is None else team.pool.map
        writer = self.sink.open(index)
        shard = self.sink.shards[index]
        split = [spec for spec in shard if team.size > 1 and spec.num_blocks >= 8 * team.size]
        whole = [spec for spec in shard if spec not in split]
        try:
            for spec in split:
                self._merge_tensor(spec, writer, runner, advance)
            one = partial(self._merge_tensor, writer=writer, runner=map, advance=advance)
            for _ in runner(one, whole):
                pass
            return writer.close()
        except BaseException:
            if team.pool is not None:
                team.pool.shutdown(wait=True, cancel_futures=True)
            writer.abort()
            raise

    def _merge_tensor(
        self, spec: TensorSpec, writer: ShardWriter, runner: _Runner, advance: Callable[[int], None]
    ) -> None:
        working = self._working_spec(spec.name)
        if not working.dtype.is_floating_point:
            merge_block: Callable[[int, list[Tensor]], Tensor] = partial(self._agreed, spec.name)
        else:
            merge = start(self.job.recipe.method, working, self._settings[spec.name])
            merge_block = merge.combine

            def look(block: int) -> None:
                merge.measure(block, self._read(working, block))

            while merge.pending:
                for _ in runner(look, range(spec.num_blocks)):
                    pass
                merge.advance()

        def put(block: int) -> None:
            merged = scratch.cast("result", merge_block(block, self._read(working, block)), spec.dtype)
            writer.write(spec.name, block_range(spec, block)[0], merged)
            advance(merged.numel() * merged.element_size())

        for _ in runner(put, range(spec.num_blocks)):
            pass

    def _read(self, working: TensorSpec, block: int) -> list[Tensor]:
        """The block of every input, in the working type."""
        begin, end = block_range(working, block)
        values = []
        for index, source in enumerate(self.sources):
            value = scratch.get(f"input{index}", end - begin, source.spec(working.name).dtype)
            source.read_into(working.name, begin, value)
            if value.dtype != working.dtype:
                value = scratch.cast(f"working{index}", value, working.dtype)
            values.append(value)
        return values

    def _agreed(self, name: str, block: int, values: list[Tensor]) -> Tensor:
        """Tensors of whole numbers (buffers, masks) are not merged; all models must agree on them."""
        for source, value in zip(self.sources[1:], values[1:], strict=True):
            if not torch.equal(value, values[0]):
                raise ValueError(
                    f"merge: {name} holds no floating-point numbers and differs between {source.label} and "
                    f"{self.sources[0].label}; make them equal first"
                )
        return values[0]


def run_merge(
    recipe: Recipe,
    target: str | Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    allow: Sequence[str] = (),
    overwrite: bool = False,
    resume: bool = True,
    fsync: bool = False,
    output_format: Format = "hf",
    verify: bool = False,
    processes: int = 1,
    threads: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = lambda: None,
    progress: Advance | None = None,
) -> MergeOutcome:
    """Carries out a recipe and writes a folder in Hugging Face's or Megatron's distributed format.

    Args:
        target: appears when it is complete; until then all lies in ``<target>.partial``.
        shard_bytes: largest file of the result (or one larger tensor). Ranks and processes take whole shards,
            so there should be several for each.
        allow: keys of config.json that may differ.
        overwrite: replace what is at ``target``.
        resume: keep the finished shards of the same merge, interrupted; False: start anew.
        fsync: wait until the disk has each shard before it is recorded as finished.
        verify: read joint checkpoints once before, and compare with the digests in their manifests.
        processes: worker processes of this rank; 1: this process does the work.
        threads: per process; default: the cores, shared among processes and local ranks.
        rank, world_size, barrier: processes started from outside (torchrun), and how they wait for each
            other.

    Returns:
        What this rank did.

    Raises:
        FileNotFoundError, CheckpointError, MismatchError, ConfigError: see ``Merger``.
        FileExistsError: something is at ``target``.
        OSError: the disk is full or an input changed; what is finished stays for the next start.
    """
    begin = time.perf_counter()
    final = Path(target)
    if final.exists() and not overwrite:
        raise FileExistsError(f"merge: {final} is there already; choose another folder or overwrite it")
    folder = final.with_name(final.name + ".partial")
    job = MergeJob(
        recipe=recipe,
        folder=folder,
        shard_bytes=shard_bytes,
        allow=tuple(allow),
        fsync=fsync,
        output_format=output_format,
    )
    merger = Merger(job)
    journal = Journal(folder)
    if rank == 0:
        if verify and (problems := [line for source in merger.sources for line in source.problems()]):
            raise CheckpointError(f"merge: {'; '.join(problems)}; merge an older checkpoint")
        _prepare(merger, journal, resume)
    barrier()
    mine = range(rank, len(merger.sink.shards), world_size)
    kept = [index for index in mine if _is_finished(merger, journal, index)]
    todo = [index for index in mine if index not in kept]
    total = sum(merger.shard_bytes(index) for index in mine)
    done = _Counter(progress, total, sum(merger.shard_bytes(index) for index in kept))
    count = threads or _default_threads(processes)
    if processes > 1 and len(todo) > 1:
        _in_processes(job, todo, min(processes, len(todo)), count, done)
    else:
        with _team(count) as team:
            for index in todo:
                _do_shard(merger, journal, index, team, done.add)
    barrier()
    if rank == 0:
        _complete(merger, journal, final)
    barrier()
    return MergeOutcome(
        num_tensors=sum(len(shard) for shard in merger.sink.shards),
        num_bytes=sum(merger.shard_bytes(index) for index in range(len(merger.sink.shards))),
        merged_shards=len(todo),
        kept_shards=len(kept),
        seconds=time.perf_counter() - begin,
    )


class _Counter:
    """Bytes done, summed over threads."""

    def __init__(self, progress: Advance | None, total: int, done: int) -> None:
        self._progress, self._total, self._done = progress, total, done
        self._lock = threading.Lock()
        self.add(0)

    def add(self, num_bytes: int) -> None:
        with self._lock:
            self._done += num_bytes
            if self._progress is not None:
                self._progress(self._done, self._total)


def _prepare(merger: Merger, journal: Journal, resume: bool) -> None:
    """The folder for the unfinished result: the one of the same merge, interrupted, or a new one."""
    folder, fingerprint = merger.job.folder, merger.fingerprint()
    if folder.exists():
        if resume and journal.fingerprint() == fingerprint:
            logger.info("merge: %s is of the same merge; going on with it", folder)
            return
        logger.info("merge: %s is of another merge; starting anew", folder)
        shutil.rmtree(folder)
    merger.sink.companions.mkdir(parents=True)
    copy_companions(merger.companions, merger.sink.companions)
    journal.begin(fingerprint)


def _is_finished(merger: Merger, journal: Journal, index: int) -> bool:
    recorded = journal.finished(index)
    if recorded is None:
        return False
    if merger.sink.digest(index) == recorded:
        return True
    logger.warning("merge: shard %d was finished but is damaged now; merging it again", index + 1)
    return False


def _do_shard(
    merger: Merger,
    journal: Journal,
    index: int,
    team: Team,
    advance: Callable[[int], None],
) -> None:
    try:
        digest = merger.merge_shard(index, team, advance)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(merger.job.folder).free
        raise OSError(
            error.errno,
            f"merge: no space for shard {index + 1} ({merger.shard_bytes(index) / 1e9:.2f} GB, "
            f"{free / 1e9:.2f} GB free) in {merger.job.folder}; make room and run it again, finished shards "
            "are kept",
        ) from error
    journal.finish(index, digest)


def _complete(merger: Merger, journal: Journal, final: Path) -> None:
    """All shards are there: index, configuration, rename."""
    folder = merger.job.folder
    missing = [n + 1 for n in range(len(merger.sink.shards)) if journal.finished(n) is None]
    if missing:
        raise RuntimeError(
            f"merge: shards {missing} of {folder} were not finished by their ranks; run it again"
        )
    merger.sink.finish()
    types = {s.dtype for shard in merger.sink.shards for s in shard if s.dtype.is_floating_point}
    if len(types) == 1:
        set_dtype(merger.sink.companions, str(types.pop()).removeprefix("torch."))
    if final.exists():
        old = final.with_name(final.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        folder.rename(final)
        shutil.rmtree(old)
    else:
        folder.rename(final)
    Journal(final).remove()


def _default_threads(processes: int) -> int:
    cores = len(os.sched_getaffinity(0))
    sharing = processes * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(_MAX_THREADS, cores // sharing))


@contextmanager
def _team(count: int) -> Iterator[Team]:
    """A team of ``count`` threads, torch's own threads off meanwhile: blocks are too small to split."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if count == 1:
            yield Team(size=1)
        else:
            with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                yield Team(size=count, pool=pool)
    finally:
        torch.set_num_threads(before)


_worker: tuple[Merger, Journal, int]
"""A worker process's opened job and number of threads."""


def _start_worker(job: MergeJob, threads: int) -> None:
    global _worker
    _worker = Merger(job), Journal(job.folder), threads


def _work(index: int) -> int:
    merger, journal, threads = _worker
    with _team(threads) as team:
        _do_shard(merger, journal, index, team, lambda _: None)
    return merger.shard_bytes(index)


def _in_processes(job: MergeJob, shards: Sequence[int], processes: int, threads: int, done: _Counter) -> None:
    """Deals shards to worker processes; the first failure ends the others after their current shard."""
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(
        processes, mp_context=context, initializer=_start_worker, initargs=(job, threads)
    )
    try:
        for future in as_completed([executor.submit(_work, index) for index in shards]):
            done.add(future.result())
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
