"""What a run shows of itself: metrics.jsonl always, TensorBoard and the console view by configuration."""

from __future__ import annotations

from types import TracebackType
from typing import Self

import torch.distributed as dist

from copd_megatron.branch import Branch
from copd_megatron.config import save_resolved
from copd_megatron.evaluate import Accuracies
from copd_megatron.metrics.console import ConsoleView
from copd_megatron.metrics.writers import JsonlWriter, TensorBoardWriter, Writer
from copd_megatron.schedule import Step, num_steps


class Observer:
    """Reduces each branch's metrics, joins them over branches, and writes them on global rank 0."""

    def __init__(self, me: Branch) -> None:
        self.me = me
        self.writers: list[Writer] = []
        if not me.world.is_first:
            return
        options = me.config.logging
        me.run_dir.mkdir(parents=True, exist_ok=True)
        save_resolved(me.config, me.run_dir / "config.yaml")
        self.writers.append(JsonlWriter(me.run_dir / "metrics.jsonl"))
        if options.tensorboard:
            self.writers.append(TensorBoardWriter(me.run_dir / "tensorboard"))
        if options.console:
            trained = [name for name, branch in me.config.branches.items() if not branch.frozen]
            self.writers.append(ConsoleView(trained, num_steps(me.config.schedule)))

    def step(self, step: Step, seconds: float) -> None:
        """Writes everything collected since the last call; collective over all branches."""
        me = self.me
        me.metrics.maximum("timing/step_seconds", seconds)
        me.metrics.minimum("perf/tokens_per_second", me.num_sampled_tokens / max(seconds, 1e-9))
        me.num_sampled_tokens = 0
        for name, count in me.grader.counters().items():
            if me.engine is not None and me.engine.tp_rank == 0:
                me.metrics.total(f"rewards/{name}", count)
        if me.media is not None:
            for name, total in me.media.counters().items():
                me.metrics.maximum(f"media/{name}", total)
        if me.prompts is not None:
            me.metrics.value("data/epoch", float(me.prompts.epoch))
            me.metrics.value("data/skipped", float(sum(me.prompts.skipped.values())))
        with me.world.watch.operation("metrics", ranks=me.world.branch_ranks[me.name]):
            mine = me.metrics.reduce(dist.group.WORLD)
        named = {key if key.startswith("copd/") else f"{me.name}/{key}": value for key, value in mine.items()}
        everything: dict[str, float] = {}
        for part in me.world.all_gather_objects(named if me.world.is_branch_first else {}, "metrics.gather"):
            everything.update(part)
        for writer in self.writers:
            writer.write(step.index + 1, step.phase.value, everything)

    def validation(self, accuracies: Accuracies) -> None:
        """Adds this branch's validation accuracies to the step's metrics."""
        for domain, value in accuracies.get(self.me.name, {}).items():
            self.me.metrics.value(f"validation/accuracy/{domain}", value)
            if domain == self.me.name:
                self.me.metrics.value("validation/accuracy", value)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self.writers:
            writer.close()
