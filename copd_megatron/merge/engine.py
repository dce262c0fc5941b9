"""Merges models straight from file to file: block by block, on several threads, processes and ranks.

Memory. A thread holds one block (2^18 elements) of every input and a few float32 blocks of intermediates,
about two MiB per input and ten besides; nothing grows with the model, the tensor or the shard. Methods that
must see a whole tensor before its first element is known (TIES' threshold, DARE's norm, slerp's angle) read
it again instead of keeping it.

Work. Shards are assigned to ranks and processes; within a process, large tensors are split over threads block
by block, and small ones go to a thread as a whole. The result does not depend on any of that.

Safety. Everything goes to ``<target>.partial``; a journal there lists the finished shards with their digests.
The same merge started again verifies and keeps them. The folder is renamed when it is complete.
"""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from copd_megatron.checkpoint.manifest import CheckpointError
from copd_megatron.formats.open import Format
from copd_megatron.formats.tensors import identities, refuse_changed
from copd_megatron.hf.appear import appear, partial_of
from copd_megatron.hf.companions import chat_template, copy_companions, set_dtype
from copd_megatron.hf.dtypes import dtype_name
from copd_megatron.merge.check import check_tied_copies
from copd_megatron.merge.journal import Journal
from copd_megatron.merge.merger import SHARD_BYTES, MergeJob, Merger, Team
from copd_megatron.merge.recipe import MergeRecipe
from copd_megatron.merge.target import check_partial, check_target

logger = logging.getLogger(__name__)

_MAX_THREADS = 16


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


def run_merge(
    recipe: MergeRecipe,
    target: str | Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    allow: Sequence[str] = (),
    allow_nan: bool = False,
    overwrite: bool = False,
    resume: bool = True,
    fsync: bool = False,
    output_format: Format = "hf",
    keep_files: bool = False,
    model_path: Path | None = None,
    verify: bool = False,
    processes: int = 1,
    threads: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = lambda: None,
    progress: Callable[[int, int], None] | None = None,
    progress_of_tensors: Callable[[str, int], None] | None = None,
) -> MergeOutcome:
    """Carries out a recipe and writes a folder in Hugging Face's or Megatron's distributed format.

    Args:
        target: appears when it is complete; until then everything is in ``<target>.partial``.
        shard_bytes: largest file of the result (or one larger tensor). Ranks and processes take whole shards,
            so there should be several for each.
        allow: keys of config.json that may differ.
        allow_nan: write NaN and infinities too, instead of refusing them.
        overwrite: replace what is at ``target``.
        resume: keep the finished shards of the same merge, interrupted; False: start anew.
        fsync: wait until the disk has each shard before it is recorded as finished.
        keep_files, model_path: see ``MergeJob``.
        verify: read joint checkpoints once before, and compare with the digests in their manifests.
        processes: worker processes of this rank; 1: this process does the work.
        threads: per process; default: the cores, shared among processes and local ranks.
        rank, world_size, barrier: processes started from outside (torchrun), and how they wait for each
            other.
        progress: told of bytes of the result that are done now, and how many this rank has to do.
        progress_of_tensors: told of every tensor that is done, and its bytes; not with ``processes``.

    Returns:
        What this rank did.

    Raises:
        FileNotFoundError, CheckpointError, MismatchError, ConfigError, ValueError: see ``Merger``.
        FileExistsError: something is at ``target``.
        NotFiniteError: a model holds NaN or infinities.
        OSError: the disk is full or an input changed; what is finished stays for the next start.
    """
    begin = time.perf_counter()
    final = Path(target)
    check_target(final, overwrite=overwrite)
    job = MergeJob(
        recipe=recipe,
        folder=partial_of(final),
        shard_bytes=shard_bytes,
        allow=tuple(allow),
        allow_nan=allow_nan,
        fsync=fsync,
        output_format=output_format,
        keep_files=keep_files,
        model_path=model_path,
    )
    merger = Merger(job)
    opened = identities(merger.sources)
    journal = Journal(job.folder)
    if rank == 0:
        _prepare(merger, journal, final, resume=resume, verify=verify)
    barrier()
    mine = range(rank, len(merger.sink.shards), world_size)
    kept = [index for index in mine if _is_finished(merger, journal, index)]
    todo = [index for index in mine if index not in kept]
    done = _Counter(
        progress,
        progress_of_tensors,
        sizes={spec.name: spec.num_bytes for index in todo for spec in merger.sink.shards[index]},
        total=sum(merger.shard_bytes(index) for index in mine),
        done=sum(merger.shard_bytes(index) for index in kept),
    )
    count = threads or _default_threads(processes)
    if processes > 1 and len(todo) > 1:
        _in_processes(job, opened, todo, min(processes, len(todo)), count, done)
    else:
        with _team(count) as team:
            for index in todo:
                _do_shard(merger, opened, journal, index, team, done.add)
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
    """Bytes and tensors done, summed over threads."""

    def __init__(
        self,
        of_bytes: Callable[[int, int], None] | None,
        of_tensors: Callable[[str, int], None] | None,
        *,
        sizes: dict[str, int],
        total: int,
        done: int,
    ) -> None:
        """
        Args:
            sizes: bytes of every tensor that is to be done.
            total: bytes of those and of what was done before.
        """
        self._of_bytes, self._of_tensors = of_bytes, of_tensors
        self._sizes, self._left = sizes, dict(sizes)
        self._total, self._done = total, done
        self._lock = threading.Lock()
        self.add_bytes(0)

    def add(self, name: str, num_bytes: int) -> None:
        """More bytes of a tensor are done."""
        with self._lock:
            self._left[name] -= num_bytes
            if not self._left[name] and self._of_tensors is not None:
                self._of_tensors(name, self._sizes[name])
        self.add_bytes(num_bytes)

    def add_bytes(self, num_bytes: int) -> None:
        """More bytes are done, of whatever tensor."""
        with self._lock:
            self._done += num_bytes
            if self._of_bytes is not None:
                self._of_bytes(self._done, self._total)


def _prepare(merger: Merger, journal: Journal, final: Path, *, resume: bool, verify: bool) -> None:
    """The folder for the unfinished result: the one of the same merge, interrupted, or a new one."""
    job = merger.job
    read = [Path(path) for path in job.recipe.inputs]
    read += [source.companions for source in merger.sources if source.companions is not None]
    read += [path for path in [Path(job.recipe.origin)] if path.is_file()]
    check_partial(job.folder, journal, final, read)
    for remark in (*job.recipe.remarks(), *merger.unused, *_templates_that_differ(merger)):
        logger.warning("merge: %s", remark)
    if verify and (problems := [line for source in merger.sources for line in source.problems()]):
        raise CheckpointError(f"merge: {'; '.join(problems)}; merge an older checkpoint")
    if job.output_format == "megatron":
        check_tied_copies(merger.sources, merger.companions)
    fingerprint = merger.fingerprint()
    if job.folder.exists() and not (resume and journal.fingerprint() == fingerprint):
        logger.info("%s is of another merge; starting anew", job.folder)
        shutil.rmtree(job.folder)
    elif job.folder.exists():
        logger.info("%s is of the same merge; going on with it", job.folder)
    journal.begin(fingerprint)
    merger.sink.companions.mkdir(parents=True, exist_ok=True)
    copy_companions(merger.companions, merger.sink.companions)


def _templates_that_differ(merger: Merger) -> Iterator[str]:
    """Inputs whose prompts were rendered otherwise than those of the result will be."""
    own = chat_template(merger.companions)
    others = [
        source.label
        for source in merger.sources
        if source.companions is not None and chat_template(source.companions) != own
    ]
    if others:
        yield (
            f"{', '.join(others)}: the chat template is another than that of {merger.companions}, which the "
            "result gets (--tokenizer-source chooses)"
        )


def _is_finished(merger: Merger, journal: Journal, index: int) -> bool:
    recorded = journal.finished(index)
    if recorded is None:
        return False
    if merger.sink.digest(index) == recorded.digest:
        return True
    logger.warning("shard %d was finished but is damaged now; writing it again", index + 1)
    return False


def _do_shard(
    merger: Merger,
    opened: Sequence[str],
    journal: Journal,
    index: int,
    team: Team,
    advance: Callable[[str, int], None],
) -> None:
    """``opened``: what the inputs were when they were opened. Parts of one and of another are no model."""
    try:
        outcome = merger.merge_shard(index, team, advance)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(merger.job.folder).free
        raise OSError(
            error.errno,
            f"no space for shard {index + 1} ({merger.shard_bytes(index) / 1e9:.2f} GB, {free / 1e9:.2f} GB "
            f"free) in {merger.job.folder}; make room and run it again, finished shards are kept",
        ) from error
    refuse_changed(merger.sources, opened)
    journal.finish(index, outcome)


def _complete(merger: Merger, journal: Journal, final: Path) -> None:
    """All shards are there: index, configuration, rename."""
    folder = merger.job.folder
    records = [journal.finished(number) for number in range(len(merger.sink.shards))]
    missing = [number + 1 for number, record in enumerate(records) if record is None]
    if missing:
        raise RuntimeError(f"shards {missing} of {folder} were not finished by their ranks; run it again")
    merger.sink.finish()
    types = {s.dtype for shard in merger.sink.shards for s in shard if s.dtype.is_floating_point}
    if len(types) == 1:
        set_dtype(merger.sink.companions, dtype_name(types.pop()))
    same = set.intersection(*(set(record.equals) for record in records if record is not None))
    if same and not merger.job.recipe.copies:
        labels = ", ".join(source.label for index, source in enumerate(merger.sources) if index in same)
        logger.warning("merge: the result equals %s, element for element", labels)
    appear(folder, final)
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


_worker: tuple[Merger, Sequence[str], Journal, int]
"""A worker process's opened job, what its inputs were at the beginning, and number of threads."""


def _start_worker(job: MergeJob, opened: Sequence[str], threads: int) -> None:
    global _worker
    _worker = Merger(job), opened, Journal(job.folder), threads


def _work(index: int) -> int:
    merger, opened, journal, threads = _worker
    with _team(threads) as team:
        _do_shard(merger, opened, journal, index, team, lambda name, num_bytes: None)
    return merger.shard_bytes(index)


def _in_processes(
    job: MergeJob,
    opened: Sequence[str],
    shards: Sequence[int],
    processes: int,
    threads: int,
    done: _Counter,
) -> None:
    """Assigns shards to worker processes; the first failure ends the others after their current shard."""
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(
        processes, mp_context=context, initializer=_start_worker, initargs=(job, opened, threads)
    )
    try:
        with _not_from_the_working_folder():
            futures = [executor.submit(_work, index) for index in shards]
        for future in as_completed(futures):
            done.add_bytes(future.result())
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _not_from_the_working_folder() -> Iterator[None]:
    """Processes are started by ``python -c``, which else imports from the working folder first."""
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before
