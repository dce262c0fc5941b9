"""What makes a run continue as if it had never stopped: when to save, and what besides the weights.

``Checkpoints`` stands between the training loop and ``checkpoint/``. It collects what the loop remembers
(data positions, counters, the table so far), decides at the end of each step whether to save, and restores
everything at the start. All its methods are collective over all branches.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, cast

from copd_megatron.branch.lessons import from_bytes, to_bytes
from copd_megatron.branch.observer import Observer
from copd_megatron.branch.schedule import Step, num_steps
from copd_megatron.branch.state import Branch
from copd_megatron.branch.validation import conditions
from copd_megatron.checkpoint.compatible import check_compatible
from copd_megatron.checkpoint.joint import JointSaver, Saved, find_checkpoint, load_asked, load_checkpoint
from copd_megatron.checkpoint.manifest import step_folder
from copd_megatron.checkpoint.stop import StopSignals, deadline, must_save_now
from copd_megatron.config import to_yaml
from copd_megatron.data import PromptSequence
from copd_megatron.errors import CheckpointError, DataError, RunStorageError
from copd_megatron.evaluation.run import Accuracies
from copd_megatron.evaluation.table import Score, mean_reward
from copd_megatron.launch.dry_run import NO_CHECKPOINTS
from copd_megatron.launch.results import EXPORT, read_exports
from copd_megatron.rollout.early_stop import from_state, to_state
from copd_megatron.topology.notes import Notes

logger = logging.getLogger(__name__)

_Note = tuple[str | None, bool, bool]
"""A rank's: the signal that it got, whether its time is nearly up, whether its part of a save is written."""
_READ_BY_ALL: Final = 3
"""Steps after which every branch has read a note."""


@dataclass(kw_only=True)
class Progress:
    """How far a run has come when its loop begins."""

    steps_done: int = 0
    table: Accuracies = field(default_factory=dict)
    """Rows of the final table that are already known."""


class Checkpoints:
    """The checkpoints of a running job."""

    def __init__(self, me: Branch, observer: Observer) -> None:
        options = me.config.checkpoint
        self.me, self.observer, self.options = me, observer, options
        self.saver = JointSaver(
            me.world,
            me.actor,
            me.run_dir,
            asynchronous=options.async_save,
            keep_last=options.keep_last,
            keep_best=options.keep_best,
        )
        self.progress = Progress()
        self._signals = StopSignals()
        self._end = deadline(options.wall_clock_limit_seconds)
        self._last = time.time()
        self._longest_step = 0.0
        self._notes = Notes(me.world, "checkpoint.agree")
        self._left: int | None = None
        """The last step, if notes were left after it."""
        self._saved_after = -1
        """The step after which the last save began."""

    def __enter__(self) -> Self:
        self._signals.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._signals.__exit__(kind, error, trace)

    # ---- starting ----------------------------------------------------------------------------------------

    def resume(self) -> Progress:
        """Continues from the newest valid checkpoint of the run directory, if there is one.

        Raises:
            CheckpointError: all checkpoints are damaged, or the newest is of another model.
            ConfigError, DataError: it is of another configuration, or of other data.
        """
        me = self.me
        if me.world.is_first and not self.options.save_period:
            logger.warning("%s: set checkpoint.save_period", NO_CHECKPOINTS)
        manifest = find_checkpoint(me.world, me.run_dir, verify_hashes=self.options.verify_hashes)
        if manifest is None:
            for writer in self.observer.writers:
                writer.truncate_after(0)
            me.samples.resume_after(0)
            return self.progress
        begin = time.perf_counter()
        folder = step_folder(me.run_dir, manifest.step)
        changed = check_compatible(manifest.config, me.config, where=str(folder))
        if changed and me.world.is_first:
            logger.warning("changed since %s, so the numbers will differ: %s", folder, "; ".join(changed))
        state, me.teacher = load_checkpoint(me.world, me.actor, me.run_dir, manifest)
        try:
            self._restore(state, str(folder))
            asked = load_asked(me.world, me.run_dir, manifest)
            me.ahead = None if asked is None else from_bytes(asked, me.graph.into(me.name))
        except DataError:
            raise
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{folder / me.name}: what the loop remembers is damaged ({error!r}); move {folder} away, "
                "and the same command continues from the checkpoint before"
            ) from error
        for writer in self.observer.writers:
            writer.truncate_after(manifest.step)
        me.samples.resume_after(manifest.step)
        same = state.get("table_conditions") == conditions(me)
        comparable = all(me.world.all_gather_objects(same, "checkpoint.table"))
        table = _table_of(state["table"])
        if table and not comparable and me.world.is_first:
            logger.warning("%s has rows of the final table, measured with other validation prompts, other "
                           "verifiers or other settings: they are measured again", folder)  # fmt: skip
        self.progress = Progress(steps_done=manifest.step, table=table if comparable else {})
        goes_on = manifest.step < num_steps(me.config.schedule)
        if me.world.is_first and goes_on and read_exports(me.run_dir):
            logger.warning("%s has ended before: until it ends again, its table, its page and %s are of "
                           "that end", me.run_dir, me.run_dir / EXPORT)  # fmt: skip
        me.world.barrier("checkpoint.resumed")
        if me.world.is_first:
            logger.info(
                "resumed from %s, %d of %d steps done, in %.1f s",
                folder, manifest.step, num_steps(me.config.schedule), time.perf_counter() - begin,
            )  # fmt: skip
        return self.progress

    # ---- in the loop -------------------------------------------------------------------------------------

    def after(self, step: Step, accuracies: Accuracies | None = None, *, alone: bool = False) -> bool:
        """Saves if it is time to. Call it when a step is completely done and handed to the observer.

        Args:
            accuracies: of every branch, if they were measured after this step.
            alone: the branches do not end this step together. Then they do not wait for each other here,
                unless it is time to save, and stop one step later than they would otherwise.

        Returns:
            Whether the run must stop now, because a signal came or its time is nearly up. It has been saved.

        Raises:
            RunStorageError: it must stop now, and could not be saved.
        """
        done, options = step.index + 1, self.options
        now = time.time()
        self._longest_step = max(self._longest_step, now - self._last)
        hurry = must_save_now(
            self._end,
            now=now,
            longest_step_seconds=self._longest_step * (2 if alone else 1),
            reserve_seconds=options.save_before_seconds,
        )
        note = (self._signals.received, hurry, self.saver.written)
        notes = self._agreed(step, note, alone=alone)
        signal = next((received for received, _, _ in notes if received is not None), None)
        out_of_time = any(hurried for _, hurried, _ in notes)
        known = not alone or step.index >= self._saved_after + 2  # what notes say is of the pending save
        if self.saver.pending and known and notes and all(written for *_, written in notes):
            self.saver.complete()
        finished = done == num_steps(self.me.config.schedule)
        ends_early = signal is not None or out_of_time
        # after the last step there is nothing left to stop, but what follows may still be cut short
        stop = ends_early and not finished
        due = options.save_period and (done % options.save_period == 0 or finished)
        if due or ends_early:
            self.observer.catch_up()
            self._saved_after = step.index
            with self.me.clock.part("checkpoint"):
                self.saver.save(self._saved(done, accuracies))
        if stop:
            reason = signal or "the wall-clock limit is near"
            self.saver.complete()
            if not self.saver.saved:
                raise RunStorageError(
                    f"stopping after step {done} of {num_steps(self.me.config.schedule)} ({reason}), which "
                    "could not be saved: the line above about its checkpoint names the cause; mend that, and "
                    "the same command continues from the newest checkpoint that there is"
                )
            if self.me.world.is_first:
                logger.warning("stopping after step %d of %d: %s; start the same command again to continue",
                               done, num_steps(self.me.config.schedule), reason)  # fmt: skip
        self._last = time.time()
        return stop

    def _agreed(self, step: Step, note: _Note, *, alone: bool) -> Sequence[_Note]:
        """What all ranks have to say, the same on all of them: of this step or, where they do not wait for
        each other, of the step before, which the others have usually left by now."""
        world = self.me.world
        before, self._left = self._left, step.index if alone else None
        if not alone:
            return cast("list[_Note]", world.all_gather_objects(note, "checkpoint.agree"))
        branch = world.branch_gather(note, "checkpoint.agree")
        notes: list[_Note] = []
        if world.is_branch_first:
            self._notes.leave(step.index, branch)
            if self.me.config.opd.max_teacher_lag:
                ahead = not self._notes.are_there(step.index)
                self.me.metrics.maximum("perf/steps_ahead", float(ahead))
            if before is not None:
                notes = [note for part in self._notes.read(before) for note in part]
            self._notes.take_away(step.index - _READ_BY_ALL, own=True)
        return cast("list[_Note]", world.branch_gather(notes, "checkpoint.agree")[0])

    def wait(self) -> None:
        """Completes a save whose files are still being written."""
        self.saver.complete()

    # ---- what the loop remembers ---------------------------------------------------------------------------

    def _saved(self, done: int, accuracies: Accuracies | None) -> Saved:
        me = self.me
        if me.world.is_first:
            _sync_file(me.run_dir / "metrics.jsonl")
        return Saved(
            step=done,
            loop_state=self._loop_state(done),
            asked=None if me.ahead is None else to_bytes(me.ahead),
            teacher=me.teacher,
            config=to_yaml(me.config),
            model_path=str(Path(me.settings.model_path or me.config.model.path).resolve()),
            validation_accuracy=_mean_accuracy(accuracies),
        )

    def _loop_state(self, done: int) -> dict[str, Any]:
        me = self.me
        counts: Counter[str] = Counter()
        for part in me.world.branch_gather(_counters(me), "checkpoint.counters"):
            counts.update(part)
        return {
            "steps_done": done,
            "streams": {name: stream.state_dict() for name, stream in _streams(me).items()},
            "graded": dict(counts),
            "table": self.progress.table,
            "table_conditions": conditions(me),
            "teacher_version": None if me.teacher is None else me.teacher.version,
            "begun": to_state(me.begun),
            "first_sizes": dict(me.first_sizes),
            "solved": {domain: sorted(ids) for domain, ids in me.solved.items()},
        }

    def _restore(self, state: dict[str, Any], where: str) -> None:
        me = self.me
        saved = dict(state["streams"])
        for name, stream in _streams(me).items():
            if name in saved:
                stream.load_state_dict(saved.pop(name))
            elif me.world.is_branch_first:
                logger.warning("%s has no data position of %s, which starts from its beginning", where, name)
        if saved and me.world.is_branch_first:
            logger.warning("%s: data positions of %s are no longer used", where, ", ".join(saved))
        me.begun = from_state(state.get("begun", ()))
        me.first_sizes = dict(state.get("first_sizes", {}))
        me.solved = {domain: frozenset(ids) for domain, ids in state.get("solved", {}).items()}
        if me.world.is_branch_first:  # the counters are summed over the branch
            me.grader.restore_counters(state["graded"])


def _counters(me: Branch) -> dict[str, int]:
    """This rank's grading counts; none on a rank that does not grade."""
    grades = me.engine is not None and me.engine.tp_rank == 0
    return me.grader.counters() if grades else {}


def _streams(me: Branch) -> dict[str, PromptSequence]:
    """The branch's prompt streams by purpose."""
    own = {} if me.prompts is None else {"native": me.prompts}
    return own | {edge.name: stream for edge, stream in me.edge_prompts.items()}


def _mean_accuracy(accuracies: Accuracies | None) -> float | None:
    """None where a score is missing, too: such a mean could not be compared with those of other steps."""
    values = [mean_reward(score) for row in (accuracies or {}).values() for score in row.values()]
    return sum(values) / len(values) if values and not any(map(math.isnan, values)) else None


def _table_of(saved: Mapping[str, Mapping[str, Score | None]]) -> Accuracies:
    """The rows in a loop state, where null stands for no score."""
    return {
        model: {domain: math.nan if score is None else score for domain, score in row.items()}
        for model, row in saved.items()
    }


def _sync_file(path: Path) -> None:
    """Makes a file durable, whoever has it open for writing."""
    if path.exists():
        with path.open("rb") as file:
            os.fsync(file.fileno())
