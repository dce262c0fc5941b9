"""Whether a configuration may continue a checkpoint, and what it would change. Imports neither torch nor
Megatron."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, Final

import yaml

from copd_megatron.config import Config, ConfigError, to_yaml
from copd_megatron.config.schema import BranchConfig
from copd_megatron.untrusted.yaml_text import load_yaml

WITHOUT_EFFECT: Final = (
    "run.name",
    "run.dir",
    "run.device",
    "run.collective_timeout_seconds",
    "run.overwrite",
    "logging.*",
    "profiling.*",
    "checkpoint.*",
    "evaluation.*",
    "end.*",
    "weight_sync.*",
    "training.micro_batch_tokens",
    "training.sequence_packing",
    "training.share_prompts",
    "training.logprob_chunk_tokens",
    "training.recompute*",
    "training.overlap_*",
    "memory.*",
    "branches.*.parallel.*",
    "branches.*.rollout.tensor_parallel_size",
    "branches.*.rollout.gpu_memory_utilization",
    "branches.*.rollout.cpu_kv_cache_gib",
    "branches.*.rollout.max_num_seqs",
    "branches.*.rollout.enforce_eager",
    "branches.*.rollout.enable_prefix_caching",
    "branches.*.rollout.enable_chunked_prefill",
    "branches.*.reward.num_workers",
    # the data may have moved; whether it is the same, the stream's own fingerprint says
    "branches.*.data.train",
    "branches.*.data.validation",
    "branches.*.data.pools.*.train",
    "branches.*.data.pools.*.validation",
    "branches.*.data.pass_rates",
    "branches.*.data.pools.*.pass_rates",
)
"""Settings that may change freely: at most, rounding differs afterwards."""

FIXED: Final = ("run.seed", "branches.*.frozen", "branches.*.data.shuffle")
"""Settings that the state in a checkpoint is bound to."""


def differences(saved: str, config: Config) -> dict[str, tuple[Any, Any]]:
    """Settings that differ, dotted key to (value when saved, value now)."""
    then = _defaults(config) | _flat(load_yaml(saved))
    now = _flat(load_yaml(to_yaml(config)))
    return {
        key: (then.get(key), now.get(key))
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key)
    }


def check_compatible(saved: str, config: Config, *, where: str) -> list[str]:
    """Refuses a configuration that cannot continue a checkpoint.

    Args:
        saved: the configuration of the checkpoint, YAML.
        where: the checkpoint, for messages.

    Returns:
        Changed settings that alter the numbers from here on, ``key: then -> now`` each.

    Raises:
        ConfigError: the branches, the seed or another setting differ that the saved state is bound to.
    """
    try:
        branches = list(load_yaml(saved)["branches"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{where}: the settings in its manifest cannot be read ({error!r}); use another checkpoint"
        ) from error
    if branches != list(config.branches):
        raise ConfigError(
            f"{where} was saved with the branches {', '.join(branches)}, the configuration has "
            f"{', '.join(config.branches)}: use those names in that order, choose another run.name or "
            "run.dir, or set run.overwrite=true to start anew"
        )
    changed = differences(saved, config)
    for key, (then, now) in changed.items():
        if _matches(key, FIXED):
            raise ConfigError(
                f"{key}: {now!r}, but {where} was saved with {then!r}: set it back, choose another run.name "
                "or run.dir, or set run.overwrite=true to start anew"
            )
    return [
        f"{key}: {then!r} -> {now!r}"
        for key, (then, now) in changed.items()
        if not _matches(key, WITHOUT_EFFECT)
    ]


def _defaults(config: Config) -> dict[str, Any]:
    """Settings that an earlier release did not have yet were at their defaults, whatever they are now."""
    branches = {name: BranchConfig() for name in config.branches}
    return _flat(load_yaml(to_yaml(Config(branches=branches))))


def _matches(key: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; lists stay values."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat
