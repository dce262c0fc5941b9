"""Saving and loading of all branches of a running job together.

In a save, every branch writes its part in Megatron's format, and every rank writes a file of its own. The
first rank of each branch adds Megatron's metadata and the loop state. When all branches have reported, global
rank 0 writes the manifest. If any part fails, all ranks learn of it, the folder is deleted, and the run goes
on with the checkpoint before.
"""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper

from copd_megatron import __version__
from copd_megatron.checkpoint.actor_state import actor_layout, load_state, sharded_state
from copd_megatron.checkpoint.distcp import write_metadata
from copd_megatron.checkpoint.files import RankWriter, SaveStrategy, Written
from copd_megatron.checkpoint.manifest import (
    LOOP_STATE,
    BranchEntry,
    CheckpointError,
    FileEntry,
    Manifest,
    complete_checkpoints,
    hash_problems,
    make_folders,
    read_manifest,
    remove_checkpoint,
    remove_unfinished,
    set_aside,
    set_aside_before,
    size_problems,
    step_folder,
    step_folders,
    to_delete,
    write_durably,
    write_manifest,
)
from copd_megatron.policy import cpu
from copd_megatron.policy.actor import MegatronActor, WeightSnapshot
from copd_megatron.topology.collectives import gather_messages
from copd_megatron.topology.world import World
from copd_megatron.untrusted.json_text import MAX_BYTES, dumped, kind_of, load, made
from copd_megatron.untrusted.regular_file import read_regular

logger = logging.getLogger(__name__)

ASKED = "asked.bin"


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What goes into a checkpoint besides the actor's own state."""

    step: int
    """Steps done."""
    loop_state: Mapping[str, Any]
    """The branch's, JSON types; the same on all its ranks."""
    asked: bytes | None = None
    """The branch's questions to its teachers that are open (``branch/lessons.py``); None: there are none."""
    teacher: WeightSnapshot | None
    config: str
    """YAML"""
    model_path: str
    validation_accuracy: float | None


@dataclass(kw_only=True)
class _Pending:
    """A save whose files are still being written."""

    saved: Saved
    folder: Path
    writer: RankWriter | None
    weight_version: int
    begun: float


def plan_save(
    actor: MegatronActor, folder: Path, *, teacher: WeightSnapshot | None, copy: bool, validate: bool = True
) -> RankWriter:
    """Plans with the branch's other ranks who writes what of an actor. Collective over the branch.

    Args:
        folder: exists, and is empty.
        copy: copy the live tensors, so that training may go on before they are written.
        validate: check that the ranks' shards cover every tensor exactly once (another collective).

    Returns:
        The writer of this rank's file. ``write_metadata`` makes the folder readable when all have written.
    """
    strategy = SaveStrategy(copy=copy)
    wrapped: Any = strategy
    if actor.parallel.data_parallel_size > 1:
        wrapped = FullyParallelSaveStrategyWrapper(strategy, parallel_state.get_data_parallel_group())
    with cpu.cuda_to_cpu(), torch.no_grad():
        dist_checkpointing.save(
            sharded_state(actor, teacher=teacher, loading=False),
            str(folder),
            wrapped,
            validate_access_integrity=validate,
            async_sharded_save=True,
            async_strategy="mcore",
        )
    assert strategy.writer is not None
    return strategy.writer


class JointSaver:
    """Saves the branches of a job together. All methods are collective over all branches unless they say
    otherwise."""

    def __init__(
        self,
        world: World,
        actor: MegatronActor,
        run_dir: Path,
        *,
        asynchronous: bool,
        keep_last: int,
        keep_best: int,
    ) -> None:
        self.world, self.actor, self.run_dir = world, actor, run_dir
        self.asynchronous, self.keep_last, self.keep_best = asynchronous, keep_last, keep_best
        self._pending: _Pending | None = None
        self._validated = False
        self.saved = True
        """Whether no save has failed since the last one that is valid; the same on all ranks."""

    @property
    def pending(self) -> bool:
        """Whether a save has begun and is not completed; the same on all ranks."""
        return self._pending is not None

    @property
    def written(self) -> bool:
        """Whether this rank has written its part of the pending save. Not collective."""
        return self._pending is None or self._pending.writer is None or self._pending.writer.done

    def save(self, saved: Saved) -> None:
        """Begins a save and, unless saves are asynchronous, completes it."""
        if self.pending:
            self.complete()
        begun = time.perf_counter()
        folder = step_folder(self.run_dir, saved.step)
        if problem := self._make_folders(folder):
            self.saved = False
            self._failed(folder, [problem])
            return
        writer = None
        with self.world.watch.operation(
            "checkpoint.prepare", ranks=self.world.branch_ranks[self.world.branch]
        ):
            if self.actor.optimizer is not None:
                writer = plan_save(
                    self.actor,
                    folder / self.world.branch,
                    teacher=saved.teacher,
                    copy=self.asynchronous,
                    validate=not self._validated,
                )
                self._validated = True
        self._pending = _Pending(
            saved=saved, folder=folder, writer=writer, weight_version=self.actor.version, begun=begun
        )
        if writer is not None and self.asynchronous:
            writer.start()
        elif writer is not None:
            with self.world.watch.operation("checkpoint.write"):
                writer.write()
        if not self.asynchronous:
            self.complete()

    def complete(self) -> bool:
        """Waits for the files, writes the manifest and deletes old checkpoints. Returns whether the save is
        valid now."""
        pending = self._pending
        if pending is None:
            return True
        self._pending = None
        with self.world.watch.operation("checkpoint.wait"):
            written = pending.writer.result() if pending.writer is not None else Written()
        entry, problem = self._finish_branch(pending, written)
        reports = self.world.all_gather_objects((entry, problem), "checkpoint.gather")
        problems = list(dict.fromkeys(p for _, p in reports if p is not None))
        if not problems:
            entries = {
                name: e
                for name, ranks in self.world.branch_ranks.items()
                if (e := reports[ranks[0]][0]) is not None
            }
            problem = self._write_manifest(pending, entries) if self.world.is_first else None
            problems = [p for p in self.world.all_gather_objects(problem, "checkpoint.manifest") if p]
        self.saved = not problems
        if problems:
            self._failed(pending.folder, problems)
            return False
        if self.world.is_first:
            logger.info("saved %s in %.1f s", pending.folder, time.perf_counter() - pending.begun)
            self._delete_old()
        return True

    # ---- parts of a save ---------------------------------------------------------------------------------

    def _make_folders(self, folder: Path) -> str | None:
        """Has the first rank make the folders; returns on every rank why it cannot, or None."""
        problem = None
        if self.world.is_first:
            try:
                make_folders(folder, self.world.branches)
            except OSError as error:
                problem = f"{folder}: {error.strerror or error}"
        found: str | None = self.world.all_gather_objects(problem, "checkpoint.folders")[0]
        return found

    def _finish_branch(self, pending: _Pending, written: Written) -> tuple[BranchEntry | None, str | None]:
        """Has the branch's first rank write Megatron's metadata and the loop state. Returns its entry, and
        what failed."""
        world, saved = self.world, pending.saved
        with world.watch.operation("checkpoint.collect", ranks=world.branch_ranks[world.branch]):
            parts = gather_messages(written)
        if parts is None:
            return None, None
        problems = [part.error for part in parts if part.error is not None]
        if problems:
            return None, "; ".join(problems)
        folder = pending.folder / world.branch
        files: list[FileEntry] = [file for part in parts for file in part.files]
        try:
            if pending.writer is not None:
                assert pending.writer.metadata is not None
                places = [place for part in parts for place in part.places]
                files += write_metadata(folder, pending.writer.metadata, places)
            state = dumped(saved.loop_state, indent=1).encode()
            loop_state_of(state)  # a checkpoint that a resumed run could not read is none
            files.append(write_durably(folder / LOOP_STATE, state))
            if saved.asked is not None:
                files.append(write_durably(folder / ASKED, saved.asked))
        except OSError as error:
            return None, f"{folder}: {error.strerror or error}"
        except ValueError as error:
            return None, f"{folder}: what the loop remembers cannot be read back: {error}"
        return (
            BranchEntry(
                weight_version=pending.weight_version,
                layout=actor_layout(self.actor),
                frozen=pending.writer is None,
                model_path=saved.model_path,
                dims=asdict(self.actor.dims),
                files=tuple(files),
            ),
            None,
        )

    def _write_manifest(self, pending: _Pending, entries: dict[str, BranchEntry]) -> str | None:
        manifest = Manifest(
            step=pending.saved.step,
            branches=entries,
            config=pending.saved.config,
            saved_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            versions={
                "copd-megatron": __version__,
                "torch": version("torch"),
                "megatron-core": version("megatron-core"),
            },
            validation_accuracy=pending.saved.validation_accuracy,
        )
        try:
            write_manifest(pending.folder, manifest)
        except OSError as error:
            return f"{pending.folder}: {error.strerror or error}"
        return None

    def _failed(self, folder: Path, problems: list[str]) -> None:
        """Says that there is no checkpoint of this step, and frees its space."""
        if not self.world.is_first:
            return
        self._remove(folder)
        before = next(iter(complete_checkpoints(self.run_dir)), None)
        stays = (
            "there is none before it"
            if before is None
            else (f"the one before, {step_folder(self.run_dir, before)}, stays usable")
        )
        logger.error("checkpoint %s not saved (%s); %s", folder, "; ".join(problems), stays)

    def _delete_old(self) -> None:
        scores = {step: m.validation_accuracy for step, m in complete_checkpoints(self.run_dir).items()}
        for step in to_delete(scores, keep_last=self.keep_last, keep_best=self.keep_best):
            self._remove(step_folder(self.run_dir, step))

    def _remove(self, folder: Path) -> None:
        """What cannot be deleted costs room, not the run."""
        try:
            remove_checkpoint(folder)
        except OSError as error:
            logger.warning("%s is not deleted: %s", folder, error)


# ---- loading ---------------------------------------------------------------------------------------------


def find_checkpoint(world: World, run_dir: Path, *, verify_hashes: bool) -> Manifest | None:
    """The newest valid checkpoint. Damaged ones are renamed, and what is wrong with them is logged.

    Collective over all branches; the ranks divide the hashing among them.

    Returns:
        None if the run has not saved yet.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged. Starting over would cost the whole run.
    """
    candidates: list[Manifest] = []
    damaged: list[Path] = []
    if world.is_first:
        candidates, damaged = _complete(run_dir)
    while True:
        next_one = (candidates.pop(0) if candidates else None, damaged)
        newest, lost = world.all_gather_objects(next_one, "checkpoint.find")[0]
        if newest is None and lost:
            raise CheckpointError(
                f"all checkpoints of {run_dir} are damaged: {', '.join(path.name for path in lost)}; restore "
                "one of them under its old name, or set run.overwrite=true to start over"
            )
        if newest is None:
            return None
        folder = step_folder(run_dir, newest.step)
        mine = _loop_problems(folder, world, newest)
        problems = [p for part in world.all_gather_objects(mine, "checkpoint.loop") for p in part]
        if verify_hashes and not problems:
            with world.watch.operation("checkpoint.verify"):
                mine = hash_problems(folder, newest, part=world.rank, num_parts=world.world_size)
            problems = [p for part in world.all_gather_objects(mine, "checkpoint.verify") for p in part]
        if not problems:
            return newest
        if world.is_first:
            damaged.append(_skip(folder, problems))


def _complete(run_dir: Path) -> tuple[list[Manifest], list[Path]]:
    """Checkpoints whose manifest and sizes are right, newest first, and the names that damaged ones have been
    given, now or by an earlier start."""
    remove_unfinished(run_dir)
    found, damaged = [], set_aside_before(run_dir)
    for folder in step_folders(run_dir).values():
        try:
            manifest = read_manifest(folder)
        except CheckpointError as error:
            damaged.append(_skip(folder, [str(error)]))
            continue
        if problems := size_problems(folder, manifest):
            damaged.append(_skip(folder, problems))
        else:
            found.append(manifest)
    return found, damaged


def _skip(folder: Path, problems: list[str]) -> Path:
    """Says what is wrong with a checkpoint and renames it; returns the new name."""
    more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
    aside = set_aside(folder)
    logger.error(
        "checkpoint %s is damaged, so it is not used: %s%s; renamed to %s",
        folder,
        "; ".join(problems[:3]),
        more,
        aside,
    )
    return aside


def load_checkpoint(
    world: World, actor: MegatronActor, run_dir: Path, manifest: Manifest
) -> tuple[dict[str, Any], WeightSnapshot | None]:
    """Loads this branch's part of a checkpoint into the actor, whatever layout it has now.

    Returns:
        The branch's loop state, and the teacher snapshot if one was saved.

    Raises:
        CheckpointError: the checkpoint has no such branch, or does not fit the model.
    """
    entry = manifest.branches.get(world.branch)
    folder = step_folder(run_dir, manifest.step) / world.branch
    if entry is None:
        raise CheckpointError(
            f"{folder.parent} has no branch {world.branch!r} (it has {', '.join(manifest.branches)}); "
            "resume with the branches that it was saved with, or choose another run.dir"
        )
    try:
        state = _read_loop_state(folder, entry)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder / LOOP_STATE} cannot be read: {error!r}; move {folder.parent} away, and the same "
            "command continues from the checkpoint before"
        ) from error
    version: int | None = state["teacher_version"]
    if entry.frozen or actor.optimizer is None:
        return state, None
    with world.watch.operation("checkpoint.load", ranks=world.branch_ranks[world.branch]):
        teacher = load_state(
            actor,
            str(folder),
            with_teacher=version is not None,
            same_layout=entry.layout == actor_layout(actor),
        )
    actor.version = entry.weight_version
    if teacher is not None and version is not None:
        teacher = WeightSnapshot(version=version, tensors=teacher.tensors)
    return state, teacher


def load_asked(world: World, run_dir: Path, manifest: Manifest) -> bytes | None:
    """The branch's ``Saved.asked``, as ``load_checkpoint`` found the rest.

    Raises:
        CheckpointError: the file cannot be read.
    """
    name = f"{world.branch}/{ASKED}"
    entry = next((file for file in manifest.branches[world.branch].files if file.path == name), None)
    if entry is None:
        return None
    path = step_folder(run_dir, manifest.step) / name
    try:
        return read_regular(path, entry.num_bytes)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error!r}; use an older checkpoint") from error


def loop_state_of(text: bytes) -> dict[str, Any]:
    """A branch's loop state, whose text may be long: it holds responses that the next step continues.

    Raises:
        ValueError: it is none, or its parts that are needed here are of other types.
    """
    state = load(text, max_bytes=max(MAX_BYTES, len(text)))
    if not isinstance(state, dict):
        raise ValueError(f"it is {kind_of(state)}, expected an object")
    version = made(_TeacherVersion, {"teacher_version": state.get("teacher_version")}).teacher_version
    return {**state, "teacher_version": version}


def _read_loop_state(folder: Path, entry: BranchEntry) -> dict[str, Any]:
    """The loop state in a branch's folder. Raises OSError, or ValueError as ``loop_state_of``."""
    name = f"{folder.name}/{LOOP_STATE}"
    num_bytes = next((file.num_bytes for file in entry.files if file.path == name), MAX_BYTES)
    return loop_state_of(read_regular(folder / LOOP_STATE, num_bytes))


def _loop_problems(folder: Path, world: World, manifest: Manifest) -> list[str]:
    """What is wrong with the loop state of this rank's branch in a checkpoint's folder, as its first rank
    finds; empty if nothing is, and where the checkpoint has no such branch, which others will say."""
    entry = manifest.branches.get(world.branch)
    if entry is None or not world.is_branch_first:
        return []
    try:
        _read_loop_state(folder / world.branch, entry)
    except (OSError, ValueError) as error:
        return [f"{folder / world.branch / LOOP_STATE} cannot be read: {error}"]
    return []


@dataclass(frozen=True)
class _TeacherVersion:
    """What of the loop state is needed here."""

    teacher_version: int | None
