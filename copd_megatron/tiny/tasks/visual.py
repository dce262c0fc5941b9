"""Train and validation shards of generated image and video tasks; ``text.py`` does this for text.

Every combination of question and scene occurs once, so no validation task occurs in training. Media are drawn
when their sample is written, so memory use does not grow with the data set. The same arguments give the same
bytes (MP4 members: with the same version of PyAV). The verifier grades every gold answer before it is
written.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from copd_megatron.data.convert.write import (
    NewSample,
    WrittenDomain,
    refuse_existing,
    write_domain_shards,
)
from copd_megatron.errors import DataError
from copd_megatron.rewards import registry
from copd_megatron.tiny.tasks.families import VisualTask, family
from copd_megatron.tiny.tasks.text import divide_by_weight, subseed

_ATTEMPTS_PER_SAMPLE = 50


@dataclass(frozen=True, kw_only=True)
class VisualShare:
    """A family and its share of the domain."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings that replace the family's defaults, such as ``{"max_count": 9}``."""
    weight: float = 1.0
    """Share relative to the weights of the other families."""


def write_visual_domain(
    out: Path,
    name: str,
    shares: Sequence[VisualShare],
    *,
    num_train: int,
    num_validation: int,
    seed: int,
    prompt_suffix: str = "",
    shard_size: int = 1000,
    overwrite: bool = False,
) -> WrittenDomain:
    """Writes ``<out>/<name>-train-NNNNNN.tar`` and ``<out>/<name>-validation-NNNNNN.tar``.

    Families are mixed by weight, in random order. No task occurs twice, neither in one split nor across both.

    Raises DataError for an unknown family or setting, settings that contradict each other, too few distinct
    tasks, a gold answer to which its verifier does not give 1, or shards of these names in ``out`` (unless
    ``overwrite``).
    """
    if not shares or num_train < 1 or num_validation < 0:
        raise DataError(
            f"domain {name!r}: {len(shares)} families, {num_train} training and {num_validation} "
            "validation samples. At least one family and one training sample are needed."
        )
    if not overwrite:
        refuse_existing(out, name)
    weights = [share.weight for share in shares]
    sizes = zip(divide_by_weight(num_train, weights), divide_by_weight(num_validation, weights), strict=True)
    seen: set[str] = set()
    splits: dict[str, list[tuple[str, VisualTask]]] = {"train": [], "validation": []}
    for number, (share, (train_size, validation_size)) in enumerate(zip(shares, sizes, strict=True)):
        tasks = _generate(share, train_size + validation_size, subseed(seed, name, number, share.name), seen)
        splits["validation"] += [(share.name, task) for task in tasks[:validation_size]]
        splits["train"] += [(share.name, task) for task in tasks[validation_size:]]
    for split, members in splits.items():
        random.Random(subseed(seed, name, split)).shuffle(members)
    train, validation = write_domain_shards(
        _samples(splits["train"], prompt_suffix),
        _samples(splits["validation"], prompt_suffix) if splits["validation"] else None,
        out,
        name,
        shard_size=shard_size,
        overwrite=overwrite,
    )
    return WrittenDomain(
        train=train,
        validation=validation,
        num_train=num_train,
        num_validation=num_validation,
    )


def _generate(share: VisualShare, count: int, seed: int, seen: set[str]) -> list[VisualTask]:
    """``count`` tasks whose identities are not in ``seen``. Adds their identities to it."""
    kind = family(share.name)
    settings = kind.configure(share.settings)
    rng = random.Random(seed)
    tasks: list[VisualTask] = []
    for _ in range(count * _ATTEMPTS_PER_SAMPLE):
        if len(tasks) == count:
            break
        try:
            task = kind.make(settings, rng)
        except ValueError as error:
            raise DataError(f"family {share.name!r}: {error}. Change its settings.") from error
        if task.identity not in seen:
            seen.add(task.identity)
            _check_gold(task, share.name)
            tasks.append(task)
    if len(tasks) < count:
        raise DataError(
            f"family {share.name!r} with settings {dict(share.settings)}: {count * _ATTEMPTS_PER_SAMPLE} "
            f"attempts gave only {len(tasks)} distinct tasks of {count}. Request fewer samples or widen the "
            "settings."
        )
    return tasks


def _check_gold(task: VisualTask, name: str) -> None:
    reward = registry.get(task.verifier).verify(f"Answer: {task.answer}", task.answer, task.metadata)
    if reward < 1.0:
        raise DataError(
            f"family {name!r}, task {task.question!r}: verifier {task.verifier!r} gives the gold answer "
            f"{task.answer!r} {reward:g} instead of 1. This is a mistake in the family."
        )


def _samples(members: Sequence[tuple[str, VisualTask]], suffix: str) -> Iterator[NewSample]:
    for name, task in members:
        yield NewSample(
            prompt=task.question + suffix,
            answer=task.answer,
            verifier=task.verifier,
            metadata={"dataset": name, **task.metadata},
            media=task.draw(),
        )
