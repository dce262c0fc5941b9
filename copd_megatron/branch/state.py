"""Everything one process holds of its branch: built from the configuration, used by the loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from copd_megatron.branch.lessons import Asked
from copd_megatron.config import Config
from copd_megatron.config.graph import Edge, Graph
from copd_megatron.config.schema import BranchConfig
from copd_megatron.data import PromptSequence
from copd_megatron.data.loader import MediaLoader
from copd_megatron.metrics.reduction import Metrics
from copd_megatron.metrics.step_clock import StepClock
from copd_megatron.objectives.base import Objective
from copd_megatron.opd.privilege import Splicer
from copd_megatron.opd.router import Router
from copd_megatron.policy.actor import MegatronActor, WeightSnapshot
from copd_megatron.records import Prompt, Rollout, TrainRow
from copd_megatron.rewards.grader import Grader
from copd_megatron.rollout.early_stop import Group
from copd_megatron.rollout.engine import RolloutEngine
from copd_megatron.samples.log import SampleLog
from copd_megatron.topology.world import World
from copd_megatron.weight_sync.sync import WeightSync


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What a branch has made in this step so far; every stage returns the next one."""

    native: Sequence[Rollout] = ()
    """The branch's own rollouts."""
    rows: Sequence[TrainRow] = ()
    """Training rows of all components."""


@dataclass(kw_only=True)
class Branch:
    """This process's share of its branch. All ranks of a branch hold equal prompts, rows and metrics."""

    name: str
    config: Config
    settings: BranchConfig
    """The branch's own section."""
    world: World
    graph: Graph
    router: Router
    actor: MegatronActor
    engine: RolloutEngine | None
    """None on a frozen branch, which only scores."""
    sync: WeightSync | None
    grader: Grader
    objectives: Mapping[str, Objective]
    """By component: ``native``, and one for each edge into this branch."""
    prompts: PromptSequence | None
    """The branch's own data; None where it does not learn from its own rows."""
    edge_prompts: dict[Edge, PromptSequence]
    """Per edge into this branch, a stream of its own over the edge's prompts."""
    splicer: Splicer
    """Puts what only a teacher reads into a prompt; turns tokens into text."""
    media: MediaLoader | None
    """Images and videos by reference, decoded off this thread; None for a text model."""
    validation: dict[str, list[Prompt]]
    """Validation prompts of every domain."""
    run_dir: Path
    samples: SampleLog
    """Responses kept to be read."""
    metrics: Metrics = field(default_factory=Metrics)
    """This step's metrics, named without the branch."""
    num_sampled_tokens: int = 0
    """Response tokens sampled for training since the last step was written."""
    clock: StepClock = field(default_factory=StepClock)
    """What this rank's time goes into."""
    begun: list[Group] = field(default_factory=list)
    """Native groups that the last step left unfinished (``rollout.partial_rollouts``)."""
    ahead: Asked | None = None
    """What the teachers were asked for the next step (``opd.max_teacher_lag``)."""
    solved: dict[str, frozenset[str]] = field(default_factory=dict)
    """Ids of the validation prompts that the branch solved at its last evaluation, by domain."""
    first_sizes: dict[str, float] = field(default_factory=dict)
    """Mean |advantage| of each component at its first step (``loss.balance=drift``)."""
    num_skipped_updates: int = 0
    """Updates left out one after another, up to now."""
    reference: WeightSnapshot | None = None
    """The base weights, where the loss has a KL term."""
    teacher: WeightSnapshot | None = None
    """The weights this branch teaches with; None: the live ones."""

    @property
    def trains(self) -> bool:
        return not self.settings.frozen

    @property
    def engine_ranks(self) -> Sequence[int]:
        """Global ranks of the rollout engine that this rank is a part of."""
        assert self.engine is not None
        first = self.engine.replica * self.engine.tp_size
        return self.world.branch_ranks[self.name][first : first + self.engine.tp_size]
