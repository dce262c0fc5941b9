"""The loss, the optimizer and the update."""

from __future__ import annotations

from collections.abc import Iterator

from copd_megatron.config.schema import Aggregation, Config, LRSchedule, MismatchCorrection


def problems(config: Config) -> Iterator[str]:
    """What is wrong with how the weights are updated."""
    yield from _loss(config)
    yield from _optimizer(config)
    longest = config.model.max_sequence_tokens
    if config.training.micro_batch_tokens < longest:
        yield (
            f"training.micro_batch_tokens: {config.training.micro_batch_tokens} cannot hold one sequence of "
            f"model.max_sequence_tokens {longest}; raise it to at least {longest}"
        )


def _loss(config: Config) -> Iterator[str]:
    loss = config.loss
    if loss.constant_divisor is not None and loss.aggregation is not Aggregation.constant:
        yield (
            f"loss.constant_divisor: {loss.constant_divisor} has no effect with loss.aggregation "
            f"{loss.aggregation.value}; use loss.aggregation=constant or loss.constant_divisor=null"
        )
    if loss.mismatch_correction in (MismatchCorrection.icepop, MismatchCorrection.sequence_rejection):
        bounds = loss.mismatch_bounds
        if len(bounds) != 2 or not 0 <= bounds[0] < 1 < bounds[1]:
            yield (
                f"loss.mismatch_bounds: {bounds} must be two numbers, a lower bound in [0, 1) and an upper "
                f"bound above 1, such as [0.5, 5.0]"
            )


def _optimizer(config: Config) -> Iterator[str]:
    optimizer, schedule = config.optimizer, config.schedule
    if optimizer.lr_schedule is not LRSchedule.constant and optimizer.min_lr > optimizer.lr:
        yield f"optimizer.min_lr: {optimizer.min_lr} is above optimizer.lr {optimizer.lr}; lower it"
    steps = schedule.cycles * (schedule.rlvr_steps + schedule.opd_steps)
    updates = steps * config.training.num_mini_batches
    if 0 < updates <= optimizer.lr_warmup_steps:
        yield (
            f"optimizer.lr_warmup_steps: {optimizer.lr_warmup_steps} is as long as the whole run or longer "
            f"({updates} updates): the learning rate would never get past its warm-up; lower it"
        )
