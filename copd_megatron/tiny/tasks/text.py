"""Train and validation shards of procedurally generated text tasks, from reasoning-gym's families and ours
(``code.py``).

Each family gets its own seed, every prompt occurs once, and validation tasks never occur in the training
shards. The same arguments give the same bytes. The verifier grades every gold answer before it is written, so
a family that it cannot grade is refused here instead of showing up later as rewards of zero.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
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
from copd_megatron.rewards.verifiers.numeric import is_number
from copd_megatron.rewards.verifiers.reasoning_gym import library
from copd_megatron.tiny.tasks import code

AUTO_VERIFIER = "auto"
_ATTEMPTS_PER_SAMPLE = 20
_NUM_CHECKED = 20


@dataclass(frozen=True, kw_only=True)
class Family:
    """A reasoning-gym family and its share of the domain."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the family, such as ``{"min_terms": 2, "max_terms": 2}``."""
    weight: float = 1.0
    """Share relative to the weights of the other families."""
    verifier: str = AUTO_VERIFIER
    """``auto`` means the family's own, if it names one (``code.py``); ``numeric`` if all gold answers are
    numbers; else ``reasoning_gym`` if the family scores answers itself; else ``exact``."""


def family_options(
    families: Sequence[str], settings: Sequence[str]
) -> list[tuple[str, float, dict[str, Any]]]:
    """Families from a command line: name, weight, settings.

    Args:
        families: ``name`` or ``name:weight``.
        settings: ``family.setting=value``, or ``setting=value`` if there is one family; values are JSON or
            text.

    Raises DataError for a weight that is no number above 0, a family named twice, and a setting of no family.
    """
    weights: dict[str, float] = {}
    for text in families:
        name, _, weight = text.partition(":")
        if name in weights:
            raise DataError(f"--family {text}: {name} is named twice. Name it once, with its weight.")
        try:
            weights[name] = float(weight or 1)
        except ValueError as error:
            raise DataError(f"--family {text}: {weight!r} is not a weight. Write family:2.") from error
        if not 0 < weights[name] < math.inf:
            raise DataError(f"--family {text}: a weight is a finite number above 0. Write family:2.")
    values: dict[str, dict[str, Any]] = {name: {} for name in weights}
    for text in settings:
        name, equals, value = text.partition("=")
        family, dot, setting = name.rpartition(".")
        if not dot and len(weights) == 1:
            family = next(iter(weights))
        if not equals or family not in weights:
            raise DataError(
                f"--set {text}: write setting=value, or family.setting=value with {sorted(weights)}."
            )
        try:
            values[family][setting] = json.loads(value)
        except json.JSONDecodeError:
            values[family][setting] = value
    return [(name, weight, values[name]) for name, weight in weights.items()]


def write_domain(
    out: Path,
    name: str,
    families: Sequence[Family],
    *,
    num_train: int,
    num_validation: int,
    seed: int,
    template: str = "{question}",
    prompt_suffix: str = "",
    shard_size: int = 1000,
    overwrite: bool = False,
) -> WrittenDomain:
    """Writes ``<out>/<name>-train-NNNNNN.tar`` and ``<out>/<name>-validation-NNNNNN.tar``.

    A prompt is ``template`` with ``{question}`` filled in, followed by ``prompt_suffix``. Families are mixed
    by weight, in random order. No prompt occurs twice, neither in one split nor across both.

    Raises DataError for an unknown family or setting, too few distinct tasks, a gold answer to which its
    verifier does not give 1, or shards of these names in ``out`` (unless ``overwrite``).
    """
    if not families or num_train < 1 or num_validation < 0:
        raise DataError(
            f"domain {name!r}: {len(families)} families, {num_train} training and {num_validation} "
            "validation samples. At least one family and one training sample are needed."
        )
    if "{question}" not in template:
        raise DataError(
            f"template {template!r} does not contain {{question}}. Insert it where the task belongs."
        )
    if not overwrite:
        refuse_existing(out, name)
    seen: set[str] = set()
    splits: dict[str, list[NewSample]] = {"train": [], "validation": []}
    weights = [family.weight for family in families]
    shares = divide_by_weight(num_train, weights), divide_by_weight(num_validation, weights)
    for number, (family, train_share, validation_share) in enumerate(zip(families, *shares, strict=True)):
        tasks = _generate(
            family,
            train_share + validation_share,
            subseed(seed, name, number, family.name),
            seen,
            template,
            prompt_suffix,
        )
        splits["validation"] += tasks[:validation_share]
        splits["train"] += tasks[validation_share:]
    for split, samples in splits.items():
        random.Random(subseed(seed, name, split)).shuffle(samples)
    train, validation = write_domain_shards(
        splits["train"],
        splits["validation"] or None,
        out,
        name,
        shard_size=shard_size,
        overwrite=overwrite,
    )
    return WrittenDomain(
        train=train, validation=validation, num_train=num_train, num_validation=num_validation
    )


def divide_by_weight(total: int, weights: Sequence[float]) -> list[int]:
    """``total`` divided by weight, with largest remainders. Raises DataError unless all weights are
    positive."""
    if any(weight <= 0 for weight in weights):
        raise DataError(f"family weights {weights}: every weight must be positive.")
    exact = [total * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: (shares[i] - exact[i], i))
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return shares


def subseed(*parts: object) -> int:
    """A 31-bit seed, derived from its purpose."""
    # reasoning-gym seeds task i with seed + i, so seeds that are close together would share tasks
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") >> 1


def _generate(
    family: Family, count: int, seed: int, seen: set[str], template: str, suffix: str
) -> list[NewSample]:
    """``count`` samples whose prompts are not in ``seen``. Adds their prompts to it."""
    if count == 0:
        return []
    attempts = count * _ATTEMPTS_PER_SAMPLE
    dataset = _create(family, seed=seed, size=attempts)
    entries: list[tuple[str, dict[str, Any]]] = []
    for entry in _entries(dataset, attempts):
        if not isinstance(entry["answer"], str):
            raise DataError(
                f"family {family.name!r} gives {entry['answer']!r} instead of a gold answer, so its grading "
                "cannot be checked. Choose another family."
            )
        prompt = template.replace("{question}", entry["question"]) + suffix
        if prompt not in seen:
            seen.add(prompt)
            entries.append((prompt, entry))
            if len(entries) == count:
                break
    else:
        raise DataError(
            f"family {family.name!r} with settings {dict(family.settings)}: {attempts} attempts gave only "
            f"{len(entries)} distinct tasks of {count}. Request fewer samples or widen the settings."
        )
    verifier = family.verifier
    if verifier == AUTO_VERIFIER:
        verifier = _choose_verifier(dataset, [entry["answer"] for _, entry in entries])
    samples = [_sample(prompt, entry, family, verifier) for prompt, entry in entries]
    _check_gold(samples, family, verifier)
    return samples


def _entries(dataset: Any, attempts: int) -> Iterator[dict[str, Any]]:
    for index in range(attempts):
        yield dataset[index]


def _create(family: Family, *, seed: int, size: int) -> Any:
    code.register()
    factory = library().factory
    if family.name not in factory.DATASETS:
        near = difflib.get_close_matches(family.name, factory.DATASETS, n=3)
        raise DataError(
            f"reasoning-gym has no family {family.name!r}. "
            + (
                f"Did you mean {' or '.join(near)}?"
                if near
                else f"It has: {', '.join(sorted(factory.DATASETS))}."
            )
        )
    fields = {item.name for item in dataclasses.fields(factory.DATASETS[family.name][1])} - {"seed", "size"}
    for setting in family.settings:
        if setting not in fields:
            near = difflib.get_close_matches(setting, fields, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"It has: {', '.join(sorted(fields))}."
            raise DataError(f"family {family.name!r} has no setting {setting!r}. {hint}")
    try:
        return factory.create_dataset(family.name, seed=seed, size=size, **family.settings)
    except (AssertionError, ValueError, TypeError) as error:
        raise DataError(
            f"family {family.name!r} refuses the settings {dict(family.settings)}: {error}. Correct them."
        ) from error


def _choose_verifier(dataset: Any, answers: Sequence[str]) -> str:
    if hasattr(dataset, "verifier"):
        return str(dataset.verifier)
    if all(is_number(answer) for answer in answers):
        return "numeric"
    base = library().dataset.ProceduralDataset
    return "exact" if type(dataset).score_answer is base.score_answer else "reasoning_gym"


def _sample(prompt: str, entry: Mapping[str, Any], family: Family, verifier: str) -> NewSample:
    metadata: dict[str, Any] = {"dataset": family.name}
    if verifier == "reasoning_gym":
        metadata |= {"question": entry["question"], "entry": entry["metadata"]}
    elif verifier == "code":
        metadata |= {"tests": entry["metadata"]["tests"]}
    try:
        plain = json.loads(json.dumps(metadata, default=_plain, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise DataError(
            f"family {family.name!r}: its task metadata cannot be stored as JSON ({error}). Choose "
            "verifier 'exact' or 'numeric', or another family."
        ) from error
    return NewSample(prompt=prompt, answer=entry["answer"], verifier=verifier, metadata=plain)


def _plain(value: Any) -> Any:
    """JSON types for numpy's scalars and arrays, and for sets, which are sorted."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} {value!r:.60}")


def _check_gold(samples: Sequence[NewSample], family: Family, verifier: str) -> None:
    found = registry.get(verifier)
    verify = found.verify
    # one that needs a sandbox takes long: a few samples show whether it works
    for sample in samples if found.requires is None else samples[:_NUM_CHECKED]:
        try:
            reward = verify(f"Answer:\n{sample.answer}", sample.answer, sample.metadata)
            problem = f"grades it {reward:g}"
        except Exception as error:  # a verifier may raise anything; here it becomes one clear refusal
            reward, problem = 0.0, f"raises {type(error).__name__}: {error}"
        if reward < 1.0:
            raise DataError(
                f"family {family.name!r}, task {sample.prompt[:80]!r}: verifier {verifier!r} does not "
                f"accept the gold answer {sample.answer[:80]!r} ({problem}). Choose another "
                "verifier or family."
            )
