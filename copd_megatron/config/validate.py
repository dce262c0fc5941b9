"""Checks that span fields. Every message gives field, value, arithmetic and remedy.

Types and names are checked when the settings are read (``load.py``), bounds of single numbers stand beside
them (``bounds.py``), model folders are checked when their shapes are read (``model/shape.py``); shards,
tokenizers and verifiers by the rooms that own them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from itertools import pairwise

from copd_megatron.config.bounds import out_of_bounds
from copd_megatron.config.layout_checks import (
    branch_against_model,
    branch_layout,
    packing,
    precision_against_model,
    precision_settings,
)
from copd_megatron.config.schema import (
    Aggregation,
    BranchConfig,
    Config,
    Device,
    LRSchedule,
    MismatchCorrection,
    Topology,
)
from copd_megatron.errors import ConfigError
from copd_megatron.model.shape import ModelShape
from copd_megatron.plugins import OBJECTIVES, RECIPES

DTYPES = ("auto", "float32", "bfloat16")
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_]*")


def validate(
    config: Config, world_size: int | None, model: ModelShape | Mapping[str, ModelShape] | None
) -> None:
    """Checks the whole run.

    Args:
        config: as ``load_config`` returns it.
        world_size: processes of the job; None: not known yet, the layout is not compared with it.
        model: shape of every branch's model, or by branch name (``read_model_shapes``); None: what depends
            on the model is not checked.

    Raises:
        ConfigError: with every problem found, not only the first.
    """
    problems = list(_problems(config, world_size, model))
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        listed = "\n".join(f"- {problem}" for problem in problems)
        raise ConfigError(f"{len(problems)} problems in the configuration:\n{listed}")


def _problems(
    config: Config, world_size: int | None, model: ModelShape | Mapping[str, ModelShape] | None
) -> Iterator[str]:
    if not config.branches:
        yield "branches: empty; name at least one branch, with its data"
        return
    yield from out_of_bounds(config)
    for name, branch in config.branches.items():
        yield from _branch(config, name, branch)
        shape = model.get(name) if isinstance(model, Mapping) else model
        # Sizes below one have been reported; dividing by them would hide that.
        if shape is not None and branch.parallel.world_size > 0 and branch.rollout.tensor_parallel_size > 0:
            yield from branch_against_model(name, branch, shape, config.run.device)
    if isinstance(model, Mapping):
        yield from _vocabularies(model)
    yield from _world(config, world_size)
    yield from _schedule(config)
    yield from _opd(config)
    yield from _loss(config)
    yield from _optimizer(config)
    yield from _training(config)
    yield from packing(config)
    yield from precision_settings(config)
    if isinstance(model, Mapping):
        yield from precision_against_model(config, model)
    yield from _media(config)
    yield from _observability(config, world_size)
    yield from _rest(config)


def _branch(config: Config, name: str, branch: BranchConfig) -> Iterator[str]:
    """What a branch's section must satisfy by itself."""
    key = f"branches.{name}"
    if not _NAME.fullmatch(name):
        yield (
            f"{key}: {name!r} cannot name a branch: it becomes part of paths and metric names, where '-' and "
            f"'/' separate branches; use letters, digits and underscores"
        )
    rollout, data = branch.rollout, branch.data
    if rollout.partial_rollouts and (not rollout.over_sampling or not config.training.max_weight_lag):
        yield (
            f"{key}.rollout.partial_rollouts: true with over_sampling {rollout.over_sampling:g} and "
            f"training.max_weight_lag {config.training.max_weight_lag}: only over-sampling leaves responses "
            f"unfinished, and their first tokens are older than the weights; set both above 0"
        )
    if rollout.top_k != -1 and rollout.top_k < 1:
        yield f"{key}.rollout.top_k: {rollout.top_k} must be -1 (no limit) or at least 1"
    elif not branch.frozen and (rollout.top_k != -1 or rollout.top_p < 1):
        yield (
            f"{key}.rollout: top_p {rollout.top_p:g} and top_k {rollout.top_k} sample from a part of the "
            "vocabulary, but the trainer's log-probabilities are over all of it: they would be too low by up "
            f"to -log top_p = {-math.log(rollout.top_p):.3g} nats, and the importance ratios wrong; use "
            "top_p=1 and top_k=-1"
        )
    total = data.max_prompt_tokens + rollout.max_new_tokens
    if total > config.model.max_sequence_tokens:
        yield (
            f"{key}: data.max_prompt_tokens + rollout.max_new_tokens = {data.max_prompt_tokens} + "
            f"{rollout.max_new_tokens} = {total} exceeds model.max_sequence_tokens "
            f"{config.model.max_sequence_tokens}; raise that or lower one of the two"
        )
    if not data.train and _needs_prompts(config, name):
        yield f"{key}.data.train: empty; give webdataset shards (paths, globs or brace ranges)"
    if not branch.reward.verifiers and not branch.frozen:
        yield f"{key}.reward.verifiers: empty; name those that its samples ask for"
    grpo = config.native.weight and config.native.objective == "grpo"
    if not branch.frozen and grpo and branch.num_generations_per_prompt == 1:
        yield (
            f"{key}.num_generations_per_prompt: 1 leaves no group to take a baseline from, every GRPO "
            f"advantage would be 0; use at least 2"
        )
    yield from _branch_batches(config, name, branch)
    yield from branch_layout(key, branch)


def _needs_prompts(config: Config, name: str) -> bool:
    """Trains on its own prompts, or lends them to a student."""
    if not config.branches[name].frozen:
        return True
    if config.schedule.opd_steps == 0 or config.opd.topology is Topology.none:
        return False
    if config.opd.topology is Topology.custom:
        return any((edge.prompts or edge.teacher) == name for edge in config.opd.edges)
    return True


def _branch_batches(config: Config, name: str, branch: BranchConfig) -> Iterator[str]:
    """A step's native samples split evenly over its mini-batches."""
    parts = config.training.num_mini_batches
    samples = branch.num_prompts_per_step * branch.num_generations_per_prompt
    if not branch.frozen and parts > 0 and samples % parts:
        yield (
            f"training.num_mini_batches: {parts} does not divide branches.{name}'s num_prompts_per_step x "
            f"num_generations_per_prompt = {branch.num_prompts_per_step} x "
            f"{branch.num_generations_per_prompt} = {samples}; change one of them"
        )


def _vocabularies(shapes: Mapping[str, ModelShape]) -> Iterator[str]:
    """Teachers score the student's token ids: one vocabulary for all."""
    for (first, a), (second, b) in pairwise(shapes.items()):
        if a.vocab_size != b.vocab_size:
            yield (
                f"branches.{second}.model_path: vocabulary of {b.vocab_size} tokens, branches.{first} has "
                f"{a.vocab_size}; branches exchange token ids, so all need the same tokenizer"
            )


def _world(config: Config, world_size: int | None) -> Iterator[str]:
    if world_size is None:
        return
    sizes = {name: branch.parallel.world_size for name, branch in config.branches.items()}
    total = sum(sizes.values())
    if total != world_size:
        listed = " + ".join(f"{size} ({name})" for name, size in sizes.items())
        yield (
            f"branches.*.parallel: the branches need {listed} = {total} ranks, the job has {world_size}; "
            f"start it with {total} processes (torchrun --nproc-per-node={total} on one machine, or nodes x "
            f"processes per node = {total}), or change tensor_model_parallel_size, "
            f"pipeline_model_parallel_size or data_parallel_size"
        )


def _schedule(config: Config) -> Iterator[str]:
    schedule = config.schedule
    if schedule.rlvr_steps == 0 and schedule.opd_steps == 0:
        yield "schedule: rlvr_steps and opd_steps are both 0, there is nothing to train; raise one"
    if all(branch.frozen for branch in config.branches.values()):
        yield "branches: every branch is frozen, there is nothing to train; set frozen: false for one"


def _opd(config: Config) -> Iterator[str]:
    branches = config.branches
    yield from _graph(config)
    yield from _names(config)
    if config.native.weight == 0 and config.schedule.rlvr_steps:
        yield (
            f"native.weight: 0 leaves nothing to learn in Phase I, but schedule.rlvr_steps="
            f"{config.schedule.rlvr_steps}; set schedule.rlvr_steps=0 for pure distillation"
        )
    if config.schedule.opd_steps > 0 and len(branches) < 2:
        yield (
            f"schedule.opd_steps: {config.schedule.opd_steps} with {len(branches)} branch: distillation "
            f"needs a teacher; add a branch or set schedule.opd_steps=0"
        )


def _names(config: Config) -> Iterator[str]:
    """Objectives and recipe that the configuration names."""
    named = [
        (RECIPES, config.recipe, "recipe"),
        (OBJECTIVES, config.native.objective, "native.objective"),
        (OBJECTIVES, config.opd.objective, "opd.objective"),
    ]
    named += [
        (OBJECTIVES, edge.objective, f"opd.edges[{i}].objective")
        for i, edge in enumerate(config.opd.edges)
        if edge.objective is not None
    ]
    for room, name, key in named:
        try:
            room.check(name, key)
        except ConfigError as error:
            yield str(error)


def _graph(config: Config) -> Iterator[str]:
    """Hub, edges and their overrides: the graph's own checks."""
    # Here and not above: the graph is built from this package's types.
    from copd_megatron.config.graph import build_graph

    try:
        graph = build_graph(config)
    except ConfigError as error:
        yield str(error)
        return
    for edge in graph.edges:
        student = config.branches[edge.student].rollout.temperature
        teacher = config.branches[edge.teacher].rollout.temperature
        if config.schedule.opd_steps > 0 and student != teacher:
            yield (
                f"edge {edge.name}: branches.{edge.student}.rollout.temperature is {student:g}, "
                f"branches.{edge.teacher}.rollout.temperature {teacher:g}: Eq. 8 would compare distributions "
                "that are sharpened differently; use one temperature for both"
            )
    if config.opd.hub is not None and config.opd.topology is not Topology.hub_and_spoke:
        yield (
            f"opd.hub: {config.opd.hub!r} has no meaning with opd.topology={config.opd.topology.value}; "
            "remove it, or use hub_and_spoke"
        )
    if config.schedule.opd_steps > 0 and len(config.branches) > 1 and not graph.edges:
        yield (
            f"schedule.opd_steps: {config.schedule.opd_steps} with opd.topology "
            f"{config.opd.topology.value}, which makes no edge here, would distil nothing; set "
            f"schedule.opd_steps=0 (its steps can go into rlvr_steps), or choose another topology"
        )


def _loss(config: Config) -> Iterator[str]:
    loss, advantage = config.loss, config.advantage
    if loss.ratio_clip_min >= 1:
        yield (
            f"loss.ratio_clip_min: {loss.ratio_clip_min} puts the lower bound at 1 - {loss.ratio_clip_min} = "
            f"{1 - loss.ratio_clip_min:g}, which no ratio is below; use less than 1"
        )
    if loss.constant_divisor is not None and loss.aggregation is not Aggregation.constant:
        yield (
            f"loss.constant_divisor: {loss.constant_divisor} has no effect with loss.aggregation "
            f"{loss.aggregation.value}; use loss.aggregation=constant or loss.constant_divisor=null"
        )
    correction = loss.mismatch_correction
    if correction in (MismatchCorrection.icepop, MismatchCorrection.sequence_rejection):
        bounds = loss.mismatch_bounds
        if len(bounds) != 2 or not 0 <= bounds[0] < 1 < bounds[1]:
            yield (
                f"loss.mismatch_bounds: {bounds} must be two numbers, a lower bound in [0, 1) and an upper "
                f"bound above 1, such as [0.5, 5.0]"
            )
    for name, branch in config.branches.items():
        if advantage.overlong_buffer_tokens > branch.rollout.max_new_tokens:
            yield (
                f"advantage.overlong_buffer_tokens: {advantage.overlong_buffer_tokens} is longer than "
                f"branches.{name}.rollout.max_new_tokens {branch.rollout.max_new_tokens}; lower it"
            )


def _optimizer(config: Config) -> Iterator[str]:
    optimizer = config.optimizer
    if optimizer.lr_schedule is not LRSchedule.constant and optimizer.min_lr > optimizer.lr:
        yield f"optimizer.min_lr: {optimizer.min_lr} is above optimizer.lr {optimizer.lr}; lower it"
    schedule = config.schedule
    steps = schedule.cycles * (schedule.rlvr_steps + schedule.opd_steps) * config.training.num_mini_batches
    if 0 < steps <= optimizer.lr_warmup_steps:
        yield (
            f"optimizer.lr_warmup_steps: {optimizer.lr_warmup_steps} is as long as the whole run or longer "
            f"({steps} optimizer steps): the learning rate would never reach optimizer.lr; lower it"
        )
    for beta, value in (("adam_beta1", optimizer.adam_beta1), ("adam_beta2", optimizer.adam_beta2)):
        if value == 1:
            yield f"optimizer.{beta}: 1 never forgets its start value 0, no step would move; use less than 1"


def _training(config: Config) -> Iterator[str]:
    training = config.training
    longest = config.model.max_sequence_tokens
    if 0 < training.micro_batch_tokens < longest:
        yield (
            f"training.micro_batch_tokens: {training.micro_batch_tokens} cannot hold one sequence of "
            f"model.max_sequence_tokens {longest}; raise it to at least {longest}"
        )


def _media(config: Config) -> Iterator[str]:
    media = config.media
    bounds = {
        "image_min_pixels": media.image_min_pixels,
        "image_max_pixels": media.image_max_pixels,
        "video_min_pixels": media.video_min_pixels,
        "video_max_pixels": media.video_max_pixels,
    }
    if media.max_frames < media.min_frames:
        yield (
            f"media.max_frames: {media.max_frames} is below media.min_frames {media.min_frames}; "
            "raise the one or lower the other"
        )
    for kind in ("image", "video"):
        low, high = bounds[f"{kind}_min_pixels"], bounds[f"{kind}_max_pixels"]
        if low is not None and high is not None and low > high:
            yield (
                f"media.{kind}_min_pixels: {low} exceeds media.{kind}_max_pixels {high}; "
                "lower the one or raise the other"
            )


def _rest(config: Config) -> Iterator[str]:
    if config.model.dtype not in DTYPES:
        yield f"model.dtype: {config.model.dtype!r} must be one of {', '.join(DTYPES)}"
    if config.logging.level.upper() not in LOG_LEVELS:
        yield f"logging.level: {config.logging.level!r} must be one of {', '.join(LOG_LEVELS)}"
    if config.run.name in ("", ".", "..") or "/" in config.run.name:
        yield f"run.name: {config.run.name!r} names a folder; use letters without '/', and run.dir for a path"
    checkpoint = config.checkpoint
    if checkpoint.keep_best and not config.evaluation.every_steps:
        yield (
            f"checkpoint.keep_best: {checkpoint.keep_best} needs validation accuracies, but "
            "evaluation.every_steps is 0; set it (to checkpoint.save_period, say), or keep_best=0"
        )


def _observability(config: Config, world_size: int | None) -> Iterator[str]:
    wandb, prometheus, profiling = config.logging.wandb, config.logging.prometheus, config.profiling
    if wandb.enabled and (not wandb.project or set(wandb.project) & set("/\\#?%:")):
        yield (
            f"logging.wandb.project: {wandb.project!r} is no project name of W&B; use one without any of "
            "/ \\ # ? % :"
        )
    if prometheus.textfile is not None and not prometheus.textfile.endswith(".prom"):
        yield (
            f"logging.prometheus.textfile: {prometheus.textfile!r} does not end in .prom, and node_exporter "
            "reads no other files; add the ending"
        )
    if prometheus.port is not None and not 1 <= prometheus.port <= 65535:
        yield f"logging.prometheus.port: {prometheus.port} is no TCP port; give one in 1 .. 65535, or null"
    if profiling.memory_snapshot and config.run.device is Device.cpu:
        yield (
            "profiling.memory_snapshot: it records CUDA's allocator, but run.device is cpu; set it to false "
            "(profiling.torch_profiler works on CPUs)"
        )
    if not (profiling.torch_profiler or profiling.memory_snapshot):
        return
    schedule = config.schedule
    total = schedule.cycles * (schedule.rlvr_steps + schedule.opd_steps)
    if not 1 <= profiling.step_start <= profiling.step_end:
        yield (
            f"profiling.step_start: {profiling.step_start} .. profiling.step_end {profiling.step_end} is no "
            "range of steps; count from 1, the first not after the last"
        )
    elif profiling.step_start > total:
        yield (
            f"profiling.step_start: {profiling.step_start} is beyond the run's {total} steps "
            f"({schedule.cycles} cycles x ({schedule.rlvr_steps} rlvr + {schedule.opd_steps} opd)): nothing "
            "would be recorded; lower it"
        )
    ranks = world_size or sum(branch.parallel.world_size for branch in config.branches.values())
    if outside := [rank for rank in profiling.ranks if not 0 <= rank < ranks]:
        yield f"profiling.ranks: {outside} are not among the job's ranks 0 .. {ranks - 1}; [] means all"
