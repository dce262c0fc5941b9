"""What a recipe is: the stages of a training step, in their order.

A recipe has no loop of its own. Who teaches whom is the distillation graph (``opd``), when is the schedule,
how a component of the loss is made is its objective; a recipe says what happens between two weight versions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from copd_megatron.branch.schedule import Step, in_step
from copd_megatron.branch.state import Batch, Branch
from copd_megatron.config import Config
from copd_megatron.config.checks.distillation import distils_nothing
from copd_megatron.config.graph import build_graph
from copd_megatron.errors import ConfigError

Stage = Callable[[Branch, Step, Batch], Batch]
"""Takes what the step has made so far and returns it with its own share. Called on every rank of every
branch, frozen ones included."""


@dataclass(frozen=True)
class Recipe:
    """The stages of a training step. A file of this room defines one as ``RECIPE``."""

    stages: tuple[Stage, ...]
    distils: bool = True
    """Whether a stage makes rows of the graph's edges, or asks other branches anything."""

    def in_step(self, config: Config, step: Step) -> bool:
        """Whether the branches end a step together. Otherwise they go on, and agree one step later."""
        return self.distils and in_step(config, step)

    def check(self, config: Config) -> None:
        """Refuses a configuration whose edges no stage would use.

        Raises:
            ConfigError: with the remedy.
        """
        for problem in distils_nothing(config, build_graph(config), distils=self.distils):
            raise ConfigError(problem)
