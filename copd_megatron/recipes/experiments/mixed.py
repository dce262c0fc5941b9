"""One model on the data of all branches, by reinforcement learning: mixed-data RLVR."""

from __future__ import annotations

import math
from operator import attrgetter
from pathlib import Path

from copd_megatron.config import Config, ConfigError
from copd_megatron.config.domains import domains_of
from copd_megatron.config.schema import BranchConfig, DataConfig, PoolConfig
from copd_megatron.recipes.experiments.base import (
    Experiment,
    Task,
    export_of,
    learn_alone,
    run_of,
)

NAME = "mixed"
"""Of the run and of its only branch."""
_ALIKE = (
    "data.difficulty",
    "data.shuffle",
    "reward.terms",
    "num_generations_per_prompt",
    *(f"rollout.{name}" for name in ("temperature", "top_p", "top_k", "stop", "over_sampling")),
    *("rollout.partial_rollouts", "rollout.quantization"),
)
"""Settings that decide what a branch learns from, and that one branch can have in one way only."""


def mixed(config: Config, out: Path) -> list[Task]:
    """A run whose only branch draws from the pools of all branches, and an evaluation of it.

    It draws as many prompts from each pool as the branches together would in both phases, native prompts
    only: with K branches of equal size it has K times as many steps. Ranks and vLLM's settings are the first
    branch's; prompts and responses may be as long as the longest of any branch.

    Raises:
        ConfigError: the branches start from different models, or choose prompts, sample or reward responses
            differently.
    """
    models = {branch.model_path for branch in config.branches.values()}
    if len(models) > 1:
        named = ", ".join(sorted(path or config.model.path for path in models))
        raise ConfigError(
            f"recipe mixed: one model learns from all branches' data, but the branches start from {named}; "
            "give them the same branches.<name>.model_path, or none"
        )
    for setting in _ALIKE:
        values = [attrgetter(setting)(branch) for branch in config.branches.values()]
        if any(value != values[0] for value in values):
            raise ConfigError(
                f"recipe mixed: one branch draws from all pools, but branches.<name>.{setting} differs "
                "between the branches; give them the same, for example under branch_defaults"
            )
    run = run_of(config, out, NAME)
    sizes = {name: branch.num_prompts_per_step for name, branch in run.branches.items()}
    schedule = config.schedule
    num_steps = schedule.cycles * (schedule.rlvr_steps + schedule.opd_steps)
    branch = _one_branch(run)
    learn_alone(run, math.ceil(num_steps * sum(sizes.values()) / branch.num_prompts_per_step))
    run.branches = {NAME: branch}
    return [
        Task(name=NAME, config=run),
        Task(
            name=f"evaluate_{NAME}",
            config=config,
            after=(NAME,),
            evaluates=(export_of(out, NAME, NAME),),
        ),
    ]


def _one_branch(run: Config) -> BranchConfig:
    """The first branch with the data of all, and limits and verifiers that suit all."""
    everyone = list(run.branches.values())
    branch = everyone[0]
    branch.frozen = False
    branch.data = DataConfig(
        pools=_pools(run),
        difficulty=branch.data.difficulty,
        shuffle=branch.data.shuffle,
        max_prompt_tokens=max(other.data.max_prompt_tokens for other in everyone),
    )
    branch.rollout.max_new_tokens = max(other.rollout.max_new_tokens for other in everyone)
    branch.reward.verifiers = list(dict.fromkeys(v for other in everyone for v in other.reward.verifiers))
    branch.reward.timeout_seconds = max(other.reward.timeout_seconds for other in everyone)
    return branch


def _pools(run: Config) -> dict[str, PoolConfig]:
    """A pool for every domain that has training data, weighted by the prompts that its branch would draw."""
    pools = {}
    for name, branch in run.branches.items():
        domains = [domain for domain in domains_of(run, name) if domain.train]
        total = sum(domain.weight for domain in domains)
        for domain in domains:
            pools[domain.name] = PoolConfig(
                train=list(domain.train),
                validation=list(domain.validation),
                pass_rates=domain.pass_rates,
                weight=branch.num_prompts_per_step * domain.weight / total,
            )
    return pools


EXPERIMENT: Experiment = mixed
