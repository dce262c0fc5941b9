"""Settings of what a run shows of itself."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class WandbConfig:
    """Weights & Biases. Login, server and mode are wandb's own (``WANDB_API_KEY``, ``WANDB_BASE_URL``,
    ``WANDB_MODE=offline``)."""

    enabled: bool = False
    """Log to Weights & Biases. Needs the ``wandb`` package."""
    project: str = "copd-megatron"
    """Project that the run appears in."""
    entity: str | None = None
    """User or team. Null: the login's."""
    name: str | None = None
    """Name of the run there. Null: ``run.name``."""
    group: str | None = None
    """Group that the run is shown in, such as the seeds of one experiment. Null: none."""
    tags: list[str] = field(default_factory=list)
    """Tags of the run."""


@dataclass(kw_only=True)
class PrometheusConfig:
    """The last step's metrics in Prometheus' text format."""

    textfile: str | None = None
    """A ``.prom`` file, replaced at each step, in the folder of node_exporter's textfile collector."""
    port: int | None = None
    """Port on which global rank 0 answers ``GET /metrics``. Null: none."""
    host: str = "127.0.0.1"
    """Address on which ``port`` is opened. 127.0.0.1 is reachable from the same node only; 0.0.0.0 from every
    network that the node is in, without a password."""


@dataclass(kw_only=True)
class LoggingConfig:
    """Where metrics and log lines go. ``metrics.jsonl`` is always written."""

    console: bool = True
    """Live view: one line per branch."""
    tensorboard: bool = False
    """Write TensorBoard events to ``<run_dir>/tensorboard``."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    """Weights & Biases."""
    prometheus: PrometheusConfig = field(default_factory=PrometheusConfig)
    """Prometheus."""
    level: str = "INFO"
    """Least severe log lines that are written: DEBUG, INFO, WARNING or ERROR."""
    rank_files: bool = True
    """Every rank logs to ``<run_dir>/logs``; ``copd logs`` shows them as one."""


@dataclass(kw_only=True)
class ProfilingConfig:
    """Where the time and the memory go."""

    timeline: bool = False
    """Every rank writes what it did when; ``copd timeline`` makes one Chrome trace of it."""
    torch_profiler: bool = False
    """Record operators and kernels of the steps below, in ``<run_dir>/profile``."""
    memory_snapshot: bool = False
    """Record allocations on CUDA devices during the steps below, in ``<run_dir>/profile``."""
    step_start: int = 2
    """First step recorded. 1 is the run's first, which also warms up."""
    step_end: int = 2
    """Last step recorded."""
    ranks: list[int] = field(default_factory=lambda: [0])
    """Global ranks that are recorded. []: all."""
    record_shapes: bool = False
    """Record the shapes of operators' inputs (torch profiler)."""
    with_stack: bool = False
    """Record Python stacks (torch profiler). Slow."""
