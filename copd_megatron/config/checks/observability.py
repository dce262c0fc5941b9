"""What a run tells while it goes on, and which checkpoints it keeps."""

from __future__ import annotations

from collections.abc import Iterator

from copd_megatron.config.schema import Config, Device


def problems(config: Config, world_size: int | None) -> Iterator[str]:
    """What is wrong with logging, profiling and checkpoints.

    Args:
        world_size: processes of the job; None: as many as the branches need.
    """
    checkpoint = config.checkpoint
    if checkpoint.keep_best and not config.evaluation.every_steps:
        yield (
            f"checkpoint.keep_best: {checkpoint.keep_best} needs validation accuracies, but "
            "evaluation.every_steps is 0; set it (to checkpoint.save_period, say), or keep_best=0"
        )
    wandb, profiling = config.logging.wandb, config.profiling
    if wandb.enabled and (not wandb.project or set(wandb.project) & set("/\\#?%:")):
        yield (
            f"logging.wandb.project: {wandb.project!r} cannot be a project of W&B; use a name without any of "
            "/ \\ # ? % :"
        )
    if profiling.memory_snapshot and config.run.device is Device.cpu:
        yield (
            "profiling.memory_snapshot: it records CUDA's allocator, but run.device is cpu; set it to false "
            "(profiling.torch_profiler works on CPUs)"
        )
    if profiling.torch_profiler or profiling.memory_snapshot:
        yield from _profiled_steps(config)
        ranks = world_size or sum(branch.parallel.world_size for branch in config.branches.values())
        if outside := [rank for rank in profiling.ranks if not 0 <= rank < ranks]:
            yield f"profiling.ranks: {outside} are not among the job's ranks 0 .. {ranks - 1}; [] means all"


def _profiled_steps(config: Config) -> Iterator[str]:
    schedule, first, last = config.schedule, config.profiling.step_start, config.profiling.step_end
    total = schedule.cycles * (schedule.rlvr_steps + schedule.opd_steps)
    if not 1 <= first <= last:
        yield (
            f"profiling.step_start: {first} .. profiling.step_end {last} is not a range of steps; count from "
            "1, the first not after the last"
        )
    elif first > total:
        yield (
            f"profiling.step_start: {first} is beyond the run's {total} steps ({schedule.cycles} cycles x "
            f"({schedule.rlvr_steps} rlvr + {schedule.opd_steps} opd)): nothing would be recorded; lower it"
        )
