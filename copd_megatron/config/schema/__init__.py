"""Every setting of a run: one dataclass per component, each setting with its text beneath it.

A default lives here and nowhere else, and so does a number's bound (``config/bounds.py``). ``load.py`` reads
YAML and dotted overrides into these classes; ``validate.py`` holds the checks that span settings. Instances
are treated as read-only once loaded. Nothing here imports torch or vLLM.

``run``       name, model, schedule, evaluation, end, checkpoints
``branch``    data, media, rewards, layout, sampling
``learning``  native rows, the distillation graph, loss, advantages
``distillation``  distributions, calibration by verdicts, the reliability gate
``training``  precision, optimizer, micro-batches, memory, weight sync
``watching``  logs, metrics, profiles
``choices``   settings that are one of a few words
"""

from __future__ import annotations

from dataclasses import dataclass, field

from copd_megatron.config.schema.branch import (
    BranchConfig,
    DataConfig,
    DifficultyConfig,
    MediaConfig,
    ParallelConfig,
    PoolConfig,
    RewardConfig,
    RolloutConfig,
)
from copd_megatron.config.schema.choices import (
    Aggregation,
    Balance,
    Device,
    DifficultyBalance,
    Divergence,
    FP8Format,
    FP8Recipe,
    Gate,
    KLEstimator,
    KLPlacement,
    LRSchedule,
    Margin,
    MarginShift,
    MarginStatistic,
    MismatchCorrection,
    Privilege,
    RatioLevel,
    Recompute,
    RolloutQuantization,
    Scope,
    Support,
    Surrogate,
    TeacherMode,
    Topology,
)
from copd_megatron.config.schema.distillation import (
    CalibrationConfig,
    DistributionConfig,
    FeedbackConfig,
    GateConfig,
)
from copd_megatron.config.schema.learning import (
    AdvantageConfig,
    BehaviourConfig,
    EdgeConfig,
    LossConfig,
    NativeConfig,
    OPDConfig,
)
from copd_megatron.config.schema.run import (
    CheckpointConfig,
    EndConfig,
    EvaluationConfig,
    ModelConfig,
    RunConfig,
    ScheduleConfig,
)
from copd_megatron.config.schema.training import (
    MemoryConfig,
    OptimizerConfig,
    PrecisionConfig,
    TrainingConfig,
    WeightSyncConfig,
)
from copd_megatron.config.schema.watching import (
    LoggingConfig,
    ProfilingConfig,
    PrometheusConfig,
    SamplesConfig,
    WandbConfig,
)


@dataclass(kw_only=True)
class Config:
    """The whole run. Every branch starts from ``branch_defaults``, overlaid with its own section."""

    run: RunConfig = field(default_factory=RunConfig)
    """Name, place and randomness of the run."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The base model."""
    media: MediaConfig = field(default_factory=MediaConfig)
    """How images and videos are read."""
    branches: dict[str, BranchConfig] = field(default_factory=dict)
    """The branches by name, in rank order. ``branch_defaults`` (YAML only) fills what a branch leaves out."""
    recipe: str = "copd"
    """The stages of a step: a file of ``copd_megatron/recipes``, or one of your own,
    ``package.module:RECIPE``."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Phases and cycles."""
    native: NativeConfig = field(default_factory=NativeConfig)
    """What a branch learns from its own prompts."""
    opd: OPDConfig = field(default_factory=OPDConfig)
    """Who teaches whom."""
    loss: LossConfig = field(default_factory=LossConfig)
    """The clipped surrogate."""
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    """GRPO advantages."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and its learning rate."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """How a step's rows are computed."""
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    """FP8."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """Who holds a GPU's memory when."""
    weight_sync: WeightSyncConfig = field(default_factory=WeightSyncConfig)
    """How new weights reach vLLM."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Validation."""
    end: EndConfig = field(default_factory=EndConfig)
    """What happens after the last step."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Joint checkpoints."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Logs and metrics."""
    profiling: ProfilingConfig = field(default_factory=ProfilingConfig)
    """Timelines and profiles."""


__all__ = [
    "AdvantageConfig",
    "Aggregation",
    "Balance",
    "BehaviourConfig",
    "BranchConfig",
    "CalibrationConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "Device",
    "DifficultyBalance",
    "DifficultyConfig",
    "DistributionConfig",
    "Divergence",
    "EdgeConfig",
    "EndConfig",
    "EvaluationConfig",
    "FP8Format",
    "FP8Recipe",
    "FeedbackConfig",
    "Gate",
    "GateConfig",
    "KLEstimator",
    "KLPlacement",
    "LRSchedule",
    "LoggingConfig",
    "LossConfig",
    "Margin",
    "MarginShift",
    "MarginStatistic",
    "MediaConfig",
    "MemoryConfig",
    "MismatchCorrection",
    "ModelConfig",
    "NativeConfig",
    "OPDConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PoolConfig",
    "PrecisionConfig",
    "Privilege",
    "ProfilingConfig",
    "PrometheusConfig",
    "RatioLevel",
    "Recompute",
    "RewardConfig",
    "RolloutConfig",
    "RolloutQuantization",
    "RunConfig",
    "SamplesConfig",
    "ScheduleConfig",
    "Scope",
    "Support",
    "Surrogate",
    "TeacherMode",
    "Topology",
    "TrainingConfig",
    "WandbConfig",
    "WeightSyncConfig",
]
