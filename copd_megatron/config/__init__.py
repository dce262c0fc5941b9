"""A run's settings: typed, checked, and importable without torch.

    config = load_config("configs/two_branch_tiny.yaml", ["schedule.cycles=2"])
    shapes = read_model_shapes(config)
    validate(config, world_size=4, model=shapes)

``schema`` holds every setting and its default, ``load`` reads YAML and dotted overrides into it, and
``validate`` holds the checks that span fields. All three raise :class:`ConfigError` only.
"""

from copd_megatron.config.errors import ConfigError
from copd_megatron.config.load import load_config, save_resolved, to_yaml
from copd_megatron.config.model_shape import ModelShape, read_model_shape, read_model_shapes
from copd_megatron.config.schema import (
    AdvantageConfig,
    Aggregation,
    BehaviourConfig,
    BranchConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    Device,
    EdgeConfig,
    EndConfig,
    EvaluationConfig,
    KLEstimator,
    KLPlacement,
    LoggingConfig,
    LossConfig,
    LRSchedule,
    MediaConfig,
    MismatchCorrection,
    ModelConfig,
    OPDConfig,
    OptimizerConfig,
    ParallelConfig,
    ProfilingConfig,
    PrometheusConfig,
    RatioLevel,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    ScheduleConfig,
    TeacherMode,
    Topology,
    TrainingConfig,
    WandbConfig,
    WeightSyncConfig,
)
from copd_megatron.config.validate import validate

__all__ = [
    "AdvantageConfig",
    "Aggregation",
    "BehaviourConfig",
    "BranchConfig",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "Device",
    "EdgeConfig",
    "EndConfig",
    "EvaluationConfig",
    "KLEstimator",
    "KLPlacement",
    "LRSchedule",
    "LoggingConfig",
    "LossConfig",
    "MediaConfig",
    "MismatchCorrection",
    "ModelConfig",
    "ModelShape",
    "OPDConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ProfilingConfig",
    "PrometheusConfig",
    "RatioLevel",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "ScheduleConfig",
    "TeacherMode",
    "Topology",
    "TrainingConfig",
    "WandbConfig",
    "WeightSyncConfig",
    "load_config",
    "read_model_shape",
    "read_model_shapes",
    "save_resolved",
    "to_yaml",
    "validate",
]
