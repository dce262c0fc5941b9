"""The domains of a run: named sets of prompts that are trained on and evaluated.

A branch with ``data.pools`` has a domain for every pool. Any other branch has one domain, named after itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from copd_megatron.config.schema import Config

MEAN_COLUMN = "mean"
"""The last column of the tables of accuracies, and so the name of no domain."""


@dataclass(frozen=True, kw_only=True)
class Domain:
    """A set of prompts, with the settings that belong to it."""

    name: str
    """Unique in a run."""
    branch: str
    """Whose prompts they are. Its ``reward`` grades them, its ``data`` says how they are read."""
    is_pool: bool
    """Whether the branch may have others."""
    key: str
    """Where it stands in the settings, for messages: ``branches.text.data``."""
    train: Sequence[str]
    """Patterns of its training shards."""
    validation: Sequence[str]
    """Patterns of its validation shards."""
    pass_rates: str | None
    """Index of how often its training prompts are solved."""
    weight: float = 1.0
    """Share of the branch's prompts, relative to the branch's other domains."""


def domains_of(config: Config, branch: str) -> tuple[Domain, ...]:
    """The domains of one branch, in configuration order."""
    data, key = config.branches[branch].data, f"branches.{branch}.data"
    if not data.pools:
        return (
            Domain(
                name=branch,
                branch=branch,
                is_pool=False,
                key=key,
                train=data.train,
                validation=data.validation,
                pass_rates=data.pass_rates,
            ),
        )
    return tuple(
        Domain(
            name=name,
            branch=branch,
            is_pool=True,
            key=f"{key}.pools.{name}",
            train=pool.train,
            validation=pool.validation,
            pass_rates=pool.pass_rates,
            weight=pool.weight,
        )
        for name, pool in data.pools.items()
    )


def all_domains(config: Config) -> Iterator[Domain]:
    """The domains of all branches, in configuration order."""
    for branch in config.branches:
        yield from domains_of(config, branch)


def domains_by_name(config: Config) -> dict[str, Domain]:
    """All domains by their name."""
    return {domain.name: domain for domain in all_domains(config)}


def evaluated_as(config: Config) -> dict[str, str]:
    """The name under which each domain with validation data is evaluated.

    Domains with the same validation data, such as those of a student and of the expert whose domain it
    learns, are evaluated once, as the first: twice in a table, its mean would count them twice.
    """
    first: dict[tuple[object, ...], str] = {}
    names = {}
    for domain in all_domains(config):
        if domain.validation:
            data = (tuple(domain.validation), config.branches[domain.branch].data.max_prompt_tokens)
            names[domain.name] = first.setdefault(data, domain.name)
    return names


def describe_pools(config: Config) -> str:
    """One line for each pool with its share of the branch's prompts, for the dry run; empty without pools."""
    lines = []
    for name, branch in config.branches.items():
        pools = [domain for domain in domains_of(config, name) if domain.is_pool]
        total = sum(pool.weight for pool in pools)
        width = max((len(pool.name) for pool in pools), default=0)
        if pools:
            lines.append(f"{name}: {branch.num_prompts_per_step} prompts per step from {len(pools)} pools")
        lines += [
            f"  {pool.name:<{width}}  weight {pool.weight:g}, {pool.weight / total:.1%}, "
            f"{branch.num_prompts_per_step * pool.weight / total:.4g} prompts per step on average"
            for pool in pools
        ]
    return "\n".join(lines)
