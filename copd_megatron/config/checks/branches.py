"""A branch by itself: its name, its data, its share of a step, its context."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

from copd_megatron.config.domains import MEAN_COLUMN, all_domains, domains_of
from copd_megatron.config.schema import (
    BranchConfig,
    Config,
    Device,
    DifficultyBalance,
    MismatchCorrection,
    Topology,
)
from copd_megatron.model.shape import ModelShape

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_]*")


def problems(config: Config, shapes: Mapping[str, ModelShape]) -> Iterator[str]:
    """What is wrong with single branches.

    Args:
        shapes: models by branch, as far as they are known.
    """
    for name, branch in config.branches.items():
        yield from _name(name)
        yield from _data(config, name, branch)
        yield from _context(config, name, branch, shapes.get(name))
        if not branch.frozen:
            yield from _step(config, name, branch)
            yield from _sampling(config, name, branch)
            yield from _cpu_cache(config, name, branch, shapes.get(name))
    yield from _domain_names(config)
    yield from _media(config)


def _name(name: str) -> Iterator[str]:
    if not _NAME.fullmatch(name):
        yield (
            f"branches.{name}: {name!r} cannot name a branch: it becomes part of paths and metric names, "
            f"where '-' and '/' separate branches; use letters, digits and underscores"
        )
    if name in _ROWS:
        yield (
            f"branches.{name}: {name!r} is what tables and exports call the "
            f"{'base model' if name == 'base' else 'merged branches'}; rename the branch"
        )


_ROWS = ("base", "merged")
"""Rows of the table of accuracies, and folders of a run, that are no branch's."""


def _data(config: Config, name: str, branch: BranchConfig) -> Iterator[str]:
    for part in ("train", "validation", "pass_rates"):
        if branch.data.pools and getattr(branch.data, part):
            yield (
                f"branches.{name}.data.{part}: given beside data.pools ({', '.join(branch.data.pools)}), but "
                f"every pool has its own {part}; move this into a pool, or remove the pools"
            )
    yield from _difficulty(config, name, branch)
    if _needs_prompts(config, name):
        for domain in domains_of(config, name):
            if not domain.train:
                yield f"{domain.key}.train: empty; give webdataset shards (paths, globs or brace ranges)"
    if not branch.reward.verifiers and not branch.frozen:
        yield f"branches.{name}.reward.verifiers: empty; name those that its samples ask for"
    for term, weight in branch.reward.terms.items():
        if not math.isfinite(weight):
            yield f"branches.{name}.reward.terms.{term}: {weight} is no weight; give a finite number"
    if branch.reward.terms and not any(branch.reward.terms.values()):
        yield f"branches.{name}.reward.terms: all weights are 0; remove them, or weigh one"


def _difficulty(config: Config, name: str, branch: BranchConfig) -> Iterator[str]:
    """Repeating and leaving out prompts by pass rates needs pass rates."""
    options, key = branch.data.difficulty, f"branches.{name}.data.difficulty"
    low, high = options.min_pass_rate, options.max_pass_rate
    if low > high:
        yield f"{key}: min_pass_rate {low:g} is above max_pass_rate {high:g}, so no prompt is left; swap them"
    if options.balance is DifficultyBalance.none and (low, high) == (0, 1):
        return
    for domain in domains_of(config, name):
        if domain.train and domain.pass_rates is None:
            yield (
                f"{key}: chooses prompts by their pass rates, but {domain.key}.pass_rates is not set; make "
                f"an index with copd data difficulty --domain {domain.name}, or remove these settings"
            )


def _domain_names(config: Config) -> Iterator[str]:
    """Metrics, tables and media refer to a domain by its name alone."""
    seen: dict[str, str] = {}
    for domain in all_domains(config):
        if domain.is_pool and not _NAME.fullmatch(domain.name):
            yield (
                f"{domain.key}: {domain.name!r} cannot name a pool: it becomes part of metric names; use "
                "letters, digits and underscores"
            )
        if domain.name == MEAN_COLUMN and domain.validation:
            yield (
                f"{domain.key}: the last column of the table of accuracies is named {MEAN_COLUMN!r}; rename "
                f"the {'pool' if domain.is_pool else 'branch'}"
            )
        if domain.name in seen:
            yield (
                f"{domain.key}: {domain.name!r} is also the name of {seen[domain.name]}, and metrics and "
                "tables tell domains apart by name; rename one of them"
            )
        seen.setdefault(domain.name, domain.key)


def _needs_prompts(config: Config, name: str) -> bool:
    """Trains on its own prompts, or lends them to a student."""
    if not config.branches[name].frozen and config.native.weight > 0:
        return True
    if config.schedule.opd_steps == 0 or config.opd.topology is Topology.none:
        return False
    if config.opd.topology is Topology.custom:  # a student of teachers' prompts needs none of its own
        return any((edge.prompts or edge.teacher) == name for edge in config.opd.edges)
    return True


def _context(config: Config, name: str, branch: BranchConfig, shape: ModelShape | None) -> Iterator[str]:
    """Prompt and response fit the context, and the context fits the model and a micro-batch."""
    context = config.model.max_sequence_tokens
    prompt, response = branch.data.max_prompt_tokens, branch.rollout.max_new_tokens
    if prompt + response > context:
        yield (
            f"branches.{name}: data.max_prompt_tokens + rollout.max_new_tokens = {prompt} + {response} = "
            f"{prompt + response} exceeds model.max_sequence_tokens {context}; raise that or lower one of "
            f"the two"
        )
    if shape is not None and shape.max_position_embeddings is not None:
        longest = shape.max_position_embeddings
        if context > longest:
            yield (
                f"model.max_sequence_tokens: {context} is more than the {longest} positions that branch "
                f"{name}'s model was made for (max_position_embeddings of its config.json); use at most "
                f"{longest}"
            )
    buffer = config.advantage.overlong_buffer_tokens
    if buffer > response:
        yield (
            f"advantage.overlong_buffer_tokens: {buffer} is longer than "
            f"branches.{name}.rollout.max_new_tokens {response}; lower it"
        )


def _step(config: Config, name: str, branch: BranchConfig) -> Iterator[str]:
    """A step's native samples make groups and split evenly over its mini-batches."""
    prompts, generations = branch.num_prompts_per_step, branch.num_generations_per_prompt
    grpo = config.native.weight > 0 and config.native.objective == "grpo"
    if grpo and generations == 1:
        yield (
            f"branches.{name}.num_generations_per_prompt: 1 leaves no group to take a baseline from: a GRPO "
            f"advantage is the reward minus its group's mean, always 0 here; use at least 2"
        )
    parts, samples = config.training.num_mini_batches, prompts * generations
    if parts > 0 and samples % parts:
        yield (
            f"training.num_mini_batches: {parts} does not divide branches.{name}'s num_prompts_per_step x "
            f"num_generations_per_prompt = {prompts} x {generations} = {samples}; change one of them"
        )


def _sampling(config: Config, name: str, branch: BranchConfig) -> Iterator[str]:
    """What is sampled is what the loss assumes."""
    key, rollout = f"branches.{name}.rollout", branch.rollout
    if rollout.partial_rollouts and (not rollout.over_sampling or not config.training.max_weight_lag):
        yield (
            f"{key}.partial_rollouts: true with over_sampling {rollout.over_sampling:g} and "
            f"training.max_weight_lag {config.training.max_weight_lag}: only over-sampling leaves responses "
            f"unfinished, and their first tokens are older than the weights; set both above 0"
        )
    if config.loss.mismatch_correction is not MismatchCorrection.none:
        return
    for field, off in (("top_p", 1.0), ("top_k", -1)):
        value = getattr(rollout, field)
        if value != off:
            yield (
                f"{key}.{field}: {value:g} samples from a part of the vocabulary that holds the probability "
                f"Z, but the actor normalises over all of it: every sampled token is 1 / Z times as likely "
                f"as the loss assumes (Z = 0.8: log-probabilities off by -ln 0.8 = 0.22). Some trainers let "
                f"this pass unnoticed. Set {field}={off:g}, or weight each token by Z with "
                f"loss.mismatch_correction=tis_token"
            )


CPU_BLOCK_TOKENS = 32
"""Tokens in a block of the KV cache on a CPU (``rollout/engine.py``)."""


def _cpu_cache(config: Config, name: str, branch: BranchConfig, shape: ModelShape | None) -> Iterator[str]:
    """On a CPU, the KV cache that is set holds one longest sequence, and the block that vLLM keeps empty."""
    if config.run.device is not Device.cpu or shape is None:
        return
    groups = max(1, shape.num_query_groups // branch.rollout.tensor_parallel_size)
    number_bytes = 2 if config.model.dtype == "bfloat16" else 4
    block = 2 * CPU_BLOCK_TOKENS * groups * shape.head_dim * number_bytes * shape.num_layers
    context = config.model.max_sequence_tokens
    needed = (-(-context // CPU_BLOCK_TOKENS) + 1) * block
    if int(branch.rollout.cpu_kv_cache_gib * 2**30) < needed:
        least = math.ceil(needed / 2**30 * 1e6) / 1e6
        yield (
            f"branches.{name}.rollout.cpu_kv_cache_gib: {branch.rollout.cpu_kv_cache_gib:g} GiB hold no "
            f"sequence of model.max_sequence_tokens {context}, which takes {needed:,} bytes; use at least "
            f"{least:g}"
        )


def _media(config: Config) -> Iterator[str]:
    media = config.media
    if media.max_frames < media.min_frames:
        yield (
            f"media.max_frames: {media.max_frames} is below media.min_frames {media.min_frames}; "
            "raise the one or lower the other"
        )
    for kind in ("image", "video"):
        low, high = getattr(media, f"{kind}_min_pixels"), getattr(media, f"{kind}_max_pixels")
        if low is not None and high is not None and low > high:
            yield (
                f"media.{kind}_min_pixels: {low} exceeds media.{kind}_max_pixels {high}; "
                "lower the one or raise the other"
            )
