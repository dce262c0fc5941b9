"""Checks of a whole configuration, before anything is started.

Names and types are checked when the settings are read (``load.py``). This is the rest: single values against
the limits beside their fields (``bounds.py``), then the checks that span fields (``checks/``). Every message
gives field, value, arithmetic and remedy. Model folders are checked when their shapes are read
(``models.py``), tokenizers, shards and verifiers by
``launch/preflight.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from copd_megatron.config.bounds import violations
from copd_megatron.config.checks import (
    branches,
    distillation,
    layout,
    objective,
    observability,
    precision,
    switches,
)
from copd_megatron.config.schema import Config
from copd_megatron.errors import ConfigError
from copd_megatron.model.shape import ModelShape


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
    shapes = model if isinstance(model, Mapping) or model is None else dict.fromkeys(config.branches, model)
    problems = list(_problems(config, world_size, shapes))
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        listed = "\n".join(f"- {problem}" for problem in problems)
        raise ConfigError(f"{len(problems)} problems in the configuration:\n{listed}")


def _problems(
    config: Config, world_size: int | None, shapes: Mapping[str, ModelShape] | None
) -> Iterator[str]:
    if not config.branches:
        yield "branches: empty; name at least one branch, with its data"
        return
    single = list(violations(config))
    yield from single
    sizes_are_sound = not any(problem.startswith("branches.") for problem in single)
    if sizes_are_sound:  # else what follows would divide by the sizes just reported
        yield from branches.problems(config, shapes or {})
        yield from layout.problems(config, shapes or {})
    yield from layout.world(config, world_size)
    yield from distillation.problems(config, shapes or {})
    yield from objective.problems(config)
    yield from precision.problems(config, shapes or {})
    yield from observability.problems(config, world_size)
    yield from switches.problems(config)
