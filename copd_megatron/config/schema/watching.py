"""Settings of what a run shows of itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from copd_megatron.config.bounds import (
    Bounds,
    Matches,
    NonNegativeInt,
    OneOf,
    PathText,
    PositiveInt,
)

_TEXTFILE = Matches(r".*\.prom", "a path that ends in .prom, since node_exporter reads no other files")


@dataclass(kw_only=True)
class WandbConfig:
    """Weights & Biases. Login, server and mode are wandb's own (``WANDB_API_KEY``, ``WANDB_BASE_URL``,
    ``WANDB_MODE=offline``)."""

    enabled: bool = False
    """Send metrics to Weights & Biases. Needs the ``wandb`` package."""
    project: str = "copd-megatron"
    """Project that the run appears in."""
    entity: str | None = None
    """User or team that owns the project. Null: the login's."""
    name: str | None = None
    """Name of the run in W&B. Null: ``run.name``."""
    group: str | None = None
    """Group that the run appears in, several seeds of one experiment, say. Null: none."""
    tags: list[str] = field(default_factory=list)
    """Tags of the run, to filter by."""


@dataclass(kw_only=True)
class PrometheusConfig:
    """The last step's metrics in Prometheus' text format."""

    textfile: Annotated[PathText, _TEXTFILE] | None = None
    """A ``.prom`` file in the folder of node_exporter's textfile collector, replaced at each step. Null:
    none."""
    port: Annotated[int, Bounds(at_least=1, at_most=65535)] | None = None
    """TCP port at which global rank 0 answers ``GET /metrics``. Null: none."""
    host: str = "127.0.0.1"
    """Address on which ``port`` is opened. 127.0.0.1 is reachable from the same node only; 0.0.0.0 from every
    network that the node is in, without a password."""


@dataclass(kw_only=True)
class SamplesConfig:
    """Responses kept in ``<run_dir>/samples``, which ``copd samples`` and ``copd report`` show."""

    per_step: NonNegativeInt = 8
    """Training responses kept of each branch and step, chosen by the run's seed: an equal share of the
    branch's own and of each edge's. 0: none."""
    every_steps: PositiveInt = 1
    """Steps between two whose responses are kept."""
    per_evaluation: NonNegativeInt = 16
    """Responses kept of each model and domain at each evaluation, the same prompts every time. 0: none."""
    max_tokens: PositiveInt = 1024
    """Tokens kept of a response, and of a prompt: of longer ones the beginning and the end. A response of
    1,024 tokens takes about 10 KB, so 8 a step take at most about 80 KB a branch."""


@dataclass(kw_only=True)
class LoggingConfig:
    """Where metrics and log lines go. ``metrics.jsonl`` is always written."""

    console: bool = True
    """Live view in the terminal, one line a branch."""
    tensorboard: bool = False
    """Write TensorBoard events to ``<run_dir>/tensorboard``."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    """Weights & Biases."""
    prometheus: PrometheusConfig = field(default_factory=PrometheusConfig)
    """Prometheus."""
    level: Annotated[str, OneOf(("DEBUG", "INFO", "WARNING", "ERROR"), ignore_case=True)] = "INFO"
    """Least severe messages that are logged: DEBUG, INFO, WARNING or ERROR."""
    rank_files: bool = True
    """Every rank logs to a file of its own in ``<run_dir>/logs``; ``copd logs`` shows them as one."""
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    """Responses that are kept to be read."""


@dataclass(kw_only=True)
class ProfilingConfig:
    """Where the time and the memory go."""

    timeline: bool = False
    """Every rank records what it did when; ``copd timeline`` makes one Chrome trace of it."""
    torch_profiler: bool = False
    """Record operators and kernels of the steps below, to ``<run_dir>/profile``."""
    memory_snapshot: bool = False
    """Record allocations on CUDA devices during the steps below, to ``<run_dir>/profile``."""
    step_start: int = 2
    """First step recorded. 1 is the run's first step, which also warms up."""
    step_end: int = 2
    """Last step recorded."""
    ranks: list[int] = field(default_factory=lambda: [0])
    """Global ranks that are recorded. []: all."""
    record_shapes: bool = False
    """Record the shapes of operators' inputs, too. Makes recorded steps slower."""
    with_stack: bool = False
    """Record the source line of each operator, too. Makes recorded steps slower."""
