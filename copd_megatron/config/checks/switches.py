"""Settings that another one switches on: where it is off, they would be read by nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from operator import attrgetter
from typing import Any, Final

from copd_megatron.config.schema import (
    Balance,
    Config,
    DifficultyBalance,
    Divergence,
    FP8Recipe,
    Gate,
    LRSchedule,
    Margin,
    MismatchCorrection,
    Recompute,
    Surrogate,
    TeacherMode,
)


@dataclass(frozen=True, kw_only=True)
class Switch:
    """What settings depend on."""

    keys: tuple[str, ...]
    needs: str
    """What has to be set, in words."""
    is_on: Callable[[Config], bool]


def _in(section: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{section}.{name}" for name in names)


_CAPPED: Final = (MismatchCorrection.tis_token, MismatchCorrection.tis_sequence)
_BOUNDED: Final = (MismatchCorrection.icepop, MismatchCorrection.sequence_rejection)

SWITCHES: Final = (
    Switch(
        keys=("evaluation.merged",),
        needs="evaluation.every_steps above 0",
        is_on=lambda c: c.evaluation.every_steps > 0,
    ),
    Switch(
        keys=("evaluation.num_generations_per_prompt",),
        needs="an evaluation.temperature above 0: greedy responses to a prompt are all the same",
        is_on=lambda c: c.evaluation.temperature > 0,
    ),
    Switch(
        keys=("checkpoint.async_save",),
        needs="checkpoint.save_period above 0: saves at the end of a job have nothing to go on beside",
        is_on=lambda c: c.checkpoint.save_period > 0,
    ),
    Switch(
        keys=("opd.ema_rate",),
        needs="opd.teacher_mode=ema",
        is_on=lambda c: c.opd.teacher_mode is TeacherMode.ema,
    ),
    Switch(
        keys=("opd.snapshot_every_steps",),
        needs="opd.teacher_mode=every_n_steps",
        is_on=lambda c: c.opd.teacher_mode is TeacherMode.every_n_steps,
    ),
    Switch(
        keys=_in("opd.behaviour", "top_k", "every_steps"),
        needs="opd.behaviour.num_states above 0",
        is_on=lambda c: c.opd.behaviour.num_states > 0,
    ),
    Switch(
        keys=_in("opd.calibration", "statistic", "margin_target", "margin_scope"),
        needs="opd.calibration.margin=shift or mask",
        is_on=lambda c: c.opd.calibration.margin is not Margin.none,
    ),
    Switch(
        keys=("opd.calibration.shift",),
        needs="opd.calibration.margin=shift",
        is_on=lambda c: c.opd.calibration.margin is Margin.shift,
    ),
    Switch(
        keys=("opd.calibration.mask_floor",),
        needs="opd.calibration.margin=mask",
        is_on=lambda c: c.opd.calibration.margin is Margin.mask,
    ),
    Switch(
        keys=("opd.calibration.balance_scope",),
        needs="opd.calibration.balance",
        is_on=lambda c: c.opd.calibration.balance is not None,
    ),
    Switch(
        keys=("opd.calibration.correct_reward",),
        needs="opd.calibration.margin or opd.calibration.balance",
        is_on=lambda c: c.opd.calibration.needs_verdicts,
    ),
    Switch(
        keys=_in("opd.gate", "margin", "num_samples", "correct_reward"),
        needs="opd.gate.scope=prompt or pool",
        is_on=lambda c: c.opd.gate.scope is not Gate.none,
    ),
    Switch(
        keys=("opd.distribution.jsd_alpha",),
        needs="opd.distribution.divergence=jsd",
        is_on=lambda c: c.opd.distribution.divergence is Divergence.jsd,
    ),
    Switch(
        keys=_in("loss", "sapo_temperature_positive", "sapo_temperature_negative"),
        needs="loss.surrogate=sapo",
        is_on=lambda c: c.loss.surrogate is Surrogate.sapo,
    ),
    Switch(
        keys=("loss.dual_clip",),
        needs="loss.surrogate=clipped",
        is_on=lambda c: c.loss.surrogate is Surrogate.clipped,
    ),
    Switch(
        keys=("loss.balance_exponent",),
        needs="loss.balance=drift",
        is_on=lambda c: c.loss.balance is Balance.drift,
    ),
    Switch(
        keys=_in("loss", "kl_estimator", "kl_placement"),
        needs="loss.kl_coefficient above 0",
        is_on=lambda c: c.loss.kl_coefficient > 0,
    ),
    Switch(
        keys=("loss.mismatch_cap",),
        needs="loss.mismatch_correction=tis_token or tis_sequence",
        is_on=lambda c: c.loss.mismatch_correction in _CAPPED,
    ),
    Switch(
        keys=("loss.mismatch_bounds",),
        needs="loss.mismatch_correction=icepop or sequence_rejection",
        is_on=lambda c: c.loss.mismatch_correction in _BOUNDED,
    ),
    Switch(
        keys=("advantage.std_epsilon",),
        needs="advantage.normalize_std=true",
        is_on=lambda c: c.advantage.normalize_std,
    ),
    Switch(
        keys=("advantage.dynamic_sampling_max_rounds",),
        needs="advantage.dynamic_sampling=true",
        is_on=lambda c: c.advantage.dynamic_sampling,
    ),
    Switch(
        keys=("advantage.overlong_penalty",),
        needs="advantage.overlong_buffer_tokens above 0",
        is_on=lambda c: c.advantage.overlong_buffer_tokens > 0,
    ),
    Switch(
        keys=("optimizer.min_lr",),
        needs="optimizer.lr_schedule=linear or cosine",
        is_on=lambda c: c.optimizer.lr_schedule is not LRSchedule.constant,
    ),
    Switch(
        keys=("training.recompute_modules",),
        needs="training.recompute=selective",
        is_on=lambda c: c.training.recompute is Recompute.selective,
    ),
    Switch(
        keys=("training.recompute_num_layers",),
        needs="training.recompute=full",
        is_on=lambda c: c.training.recompute is Recompute.full,
    ),
    Switch(
        keys=_in("precision", "fp8_format", "num_bf16_layers_at_start", "num_bf16_layers_at_end"),
        needs="precision.fp8",
        is_on=lambda c: c.precision.fp8 is not FP8Recipe.none,
    ),
    Switch(
        keys=("logging.prometheus.host",),
        needs="logging.prometheus.port",
        is_on=lambda c: c.logging.prometheus.port is not None,
    ),
)


def problems(config: Config) -> Iterator[str]:
    """Settings that differ from their defaults and have no effect."""
    for switch in SWITCHES:
        yield from without_effect(config, switch)
    for name, branch in config.branches.items():
        options = branch.data.difficulty
        if options.balance is DifficultyBalance.none and options.max_repeat != type(options)().max_repeat:
            key = f"branches.{name}.data.difficulty"
            yield _told(f"{key}.max_repeat", options.max_repeat, f"{key}.balance", type(options)().max_repeat)
    schedule, every = config.schedule, config.evaluation.every_steps
    steps = schedule.cycles * (schedule.rlvr_steps + schedule.opd_steps)
    if every > steps:
        yield (
            f"evaluation.every_steps: {every} is beyond the run's {steps} steps, so nothing would be "
            "evaluated between start and end; lower it, or set it to 0"
        )


def greedy_repeats(config: Config) -> Iterator[str]:
    """What of this an evaluation of its own has to ask: several responses that are all the same."""
    (switch,) = (s for s in SWITCHES if s.keys == ("evaluation.num_generations_per_prompt",))
    yield from without_effect(config, switch)


def without_effect(config: Config, switch: Switch) -> Iterator[str]:
    """One sentence for each setting that is changed although its switch is off."""
    if switch.is_on(config):
        return
    for key in switch.keys:
        value, default = attrgetter(key)(config), attrgetter(key)(_DEFAULTS)
        if value != default:
            yield _told(key, value, switch.needs, default)


def _told(key: str, value: Any, needs: str, default: Any) -> str:
    return (
        f"{key}: {_shown(value)} has no effect without {needs}; set that, or leave {key} at {_shown(default)}"
    )


def _shown(value: Any) -> str:
    if isinstance(value, Enum):
        return str(value.value)
    return str(value).lower() if isinstance(value, bool) else str(value)


_DEFAULTS: Final = Config()
