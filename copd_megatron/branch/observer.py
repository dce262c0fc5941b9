"""What a run shows of itself: metrics.jsonl always; console, TensorBoard, W&B, Prometheus, the timeline and
profiles by configuration."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Self

import torch.distributed as dist
import yaml

from copd_megatron.branch.merged import MERGED
from copd_megatron.branch.schedule import Step, num_steps
from copd_megatron.branch.state import Branch
from copd_megatron.config import to_yaml
from copd_megatron.config.domains import domains_of, evaluated_as
from copd_megatron.evaluation.run import Accuracies
from copd_megatron.evaluation.table import mean_reward
from copd_megatron.launch.provenance import record_start
from copd_megatron.launch.run_dir import starts_anew
from copd_megatron.metrics.console import ConsoleView
from copd_megatron.metrics.profiler import ProfilerWindow
from copd_megatron.metrics.prometheus import PrometheusEndpoint, PrometheusTextfile
from copd_megatron.metrics.rank_log import RankPlace
from copd_megatron.metrics.timeline import TimelineWriter
from copd_megatron.metrics.wandb_writer import WandbWriter
from copd_megatron.metrics.writers import JsonlWriter, TensorBoardWriter, Writer
from copd_megatron.topology.notes import Notes

logger = logging.getLogger(__name__)


class Observer:
    """Reduces each branch's metrics, joins them over branches, and writes them on global rank 0. Every rank
    writes its own timeline and profile."""

    def __init__(self, me: Branch) -> None:
        self.me = me
        self.writers: list[Writer] = []
        self._begin = time.monotonic()
        self._any_step = False
        self._notes = Notes(me.world, "metrics")
        self._late: deque[Step] = deque()
        """Steps that are not written yet; on the first rank only."""
        place = RankPlace(
            rank=me.world.rank,
            branch=me.name,
            branch_rank=me.world.branch_rank,
            branch_size=me.world.branch_size,
        )
        options = me.config.profiling
        self._profiler = ProfilerWindow(options, me.run_dir, place, cuda=me.world.device.type == "cuda")
        self._timeline: TimelineWriter | None = None
        if options.timeline:
            me.world.barrier("timeline")
            self._timeline = TimelineWriter(
                me.run_dir, place, aligned_at=time.monotonic(), append=not starts_anew(me.config)
            )
        me.world.watch.recorder = self._operation
        if me.world.is_first:
            record_start(me.config, me.run_dir)
            self.writers.extend(_writers(me))

    def _operation(self, path: str, begin: float, end: float) -> None:
        self.me.clock.operation(path, begin, end)
        if self._timeline is not None:
            self._timeline.operation(path, begin, end)

    def begin(self, step: Step) -> None:
        """A step begins. What came before the first (evaluation of the base model) is no part of it."""
        if not self._any_step:
            self.me.clock.restart()
            self._any_step = True
        self.me.samples.step = step.index + 1
        with self.me.clock.part("profile"):
            self._profiler.begin(step.index + 1)
        self._begin = time.monotonic()

    def step(self, step: Step, *, alone: bool = False) -> None:
        """Writes everything collected since the last call; collective over the branch.

        Args:
            alone: the branches do not end this step together. Then this branch does not wait for those that
                are slower: it leaves its figures to the first rank, which writes the step when it has those
                of all branches.
        """
        self._write_samples()
        me = self.me
        self._note_times()
        for name, count in me.grader.counters().items():
            if me.engine is not None and me.engine.tp_rank == 0:
                me.metrics.total(f"rewards/{name}", count)
        if me.media is not None:
            for name, total in me.media.counters().items():
                me.metrics.maximum(f"media/{name}", total)
        if me.prompts is not None:
            me.metrics.value("data/epoch", float(me.prompts.epoch))
            if me.settings.data.pools:
                for pool, epoch in me.prompts.epochs.items():
                    me.metrics.value(f"data/epoch/{pool}", float(epoch))
            me.metrics.value("data/skipped", float(sum(me.prompts.skipped.values())))
        with me.world.watch.operation("metrics", ranks=me.world.branch_ranks[me.name]):
            mine = me.metrics.reduce(dist.group.WORLD)
        named = {key if key.startswith("copd/") else f"{me.name}/{key}": value for key, value in mine.items()}
        if alone:
            self._late.append(step)
            if me.world.is_branch_first:
                self._notes.leave(step.index, named)
            self._write_late(wait=False)
        else:
            self.catch_up()
            part = named if me.world.is_branch_first else {}
            self._write(step, me.world.all_gather_objects(part, "metrics.gather"))
        if self._timeline is not None:
            self._timeline.step(step.index + 1, step.phase.value, self._begin, time.monotonic())
        with me.clock.part("profile"):
            self._profiler.end(step.index + 1)

    def catch_up(self) -> None:
        """Writes the steps for whose figures the first rank has not waited yet. Every rank calls it."""
        self._write_late(wait=True)

    def _write_late(self, *, wait: bool) -> None:
        if not self.me.world.is_first:
            self._late.clear()
        while self._late and (wait or self._notes.are_there(self._late[0].index)):
            step = self._late.popleft()
            self._write(step, self._notes.read(step.index))
            self._notes.take_away(step.index)

    def _write(self, step: Step, parts: Sequence[Mapping[str, float]]) -> None:
        """Hands a step's figures, by branch or by rank, to the writers."""
        everything = {name: value for part in parts for name, value in part.items()}
        self._each_writer(lambda writer: writer.write(step.index + 1, step.phase.value, everything))

    def _each_writer(self, write: Callable[[Writer], None]) -> None:
        for writer in list(self.writers):
            try:
                write(writer)
            except OSError as error:  # without metrics.jsonl the run ends: its writer raises RunStorageError
                logger.warning("%s stops: %s; metrics.jsonl goes on", type(writer).__name__, error)
                self.writers.remove(writer)

    def _write_samples(self) -> None:
        with self.me.clock.part("samples"):
            self.me.samples.write_step()

    def _note_times(self) -> None:
        """The step's seconds by part, as means over the branch's ranks, which add up to ``step_seconds``, and
        as the largest of any rank (``slowest``); and how long the loop's thread had a processor
        (``processor``)."""
        me = self.me
        details, processor = me.clock.details, me.clock.processor_seconds
        seconds, parts = me.clock.lap()
        for name, value in ({f"{part}_seconds": s for part, s in parts.items()} | details).items():
            me.metrics.mean(f"timing/{name}", value)
            me.metrics.maximum(f"timing/slowest/{name}", value)
        for part, value in processor.items():
            me.metrics.maximum(f"timing/processor/{part}_seconds", value)
        me.metrics.maximum("timing/processor/step_seconds", sum(processor.values()))
        me.metrics.mean("timing/step_seconds", seconds)
        trained = seconds - parts["evaluation"] - parts["checkpoint"]
        me.metrics.minimum("perf/tokens_per_second", me.num_sampled_tokens / max(trained, 1e-9))
        me.num_sampled_tokens = 0

    def validation(self, accuracies: Accuracies) -> None:
        """Adds this branch's validation accuracies to the step's metrics: the mean reward where a verifier
        gives partial credit. The one without a domain's name is the mean over the branch's own domains."""
        config = self.me.config
        found = {domain: mean_reward(score) for domain, score in accuracies.get(self.me.name, {}).items()}
        for domain, value in found.items():
            self.me.metrics.value(f"validation/accuracy/{domain}", value)
        names = [evaluated_as(config).get(domain.name) for domain in domains_of(config, self.me.name)]
        own = [found[name] for name in names if name in found]
        if own:
            self.me.metrics.value("validation/accuracy", sum(own) / len(own))

    def final(self, table: Accuracies) -> None:
        """Shows the final table's figures, the mean reward where a verifier gives partial credit, where a
        run's curves are shown. ``evaluation.json`` holds all of them."""
        figures = {
            f"final/accuracy/{model}/{domain}": mean_reward(score)
            for model, row in table.items()
            for domain, score in row.items()
        }
        if figures:
            self._each_writer(lambda writer: writer.finish(num_steps(self.me.config.schedule), figures))

    def merged(self, accuracies: Accuracies) -> None:
        """Adds what the mean of the branches scores to the step's metrics."""
        for domain, score in accuracies.get(MERGED, {}).items():
            self.me.metrics.value(f"copd/merged_accuracy/{domain}", mean_reward(score))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._profiler.close()
        self.me.world.watch.recorder = None
        if self._timeline is not None:
            self._timeline.close()
        for writer in self.writers:
            writer.close(failed=error is not None)


def _writers(me: Branch) -> Iterator[Writer]:
    """What the configuration asks for, opened."""
    options, run = me.config.logging, me.config.run.name
    yield JsonlWriter(me.run_dir / "metrics.jsonl")
    if options.tensorboard:
        yield TensorBoardWriter(me.run_dir / "tensorboard")
    if options.wandb.enabled:
        yield WandbWriter(me.run_dir, run, options.wandb, yaml.safe_load(to_yaml(me.config)))
    if options.prometheus.textfile is not None:
        yield PrometheusTextfile(options.prometheus.textfile, run=run)
    if options.prometheus.port is not None:
        yield PrometheusEndpoint(options.prometheus.host, options.prometheus.port, run=run)
    if options.console:
        trained = [name for name, branch in me.config.branches.items() if not branch.frozen]
        yield ConsoleView(trained, num_steps(me.config.schedule))
