"""A user's own JSONL files to shards, checked line by line."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from copd_megatron.data.convert.write import NewSample, WrittenDomain, write_shards
from copd_megatron.data.samples import SampleRef, sample_from_record
from copd_megatron.errors import BadSampleError, DataError
from copd_megatron.rewards import registry

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FieldMap:
    """Which fields of a line mean what. A name may be a path: ``reward_model.ground_truth``."""

    prompt: str = "prompt"
    answer: str = "answer"
    """Numbers are written as text."""
    verifier: str = "verifier"
    """Where a line lacks it, ``default_verifier`` holds."""
    default_verifier: str | None = None
    metadata: str = "metadata"
    extra_metadata: tuple[str, ...] = ()
    """Further fields to keep in the sample's metadata, under their own names."""
    key: str | None = None
    """Field with the sample's key; null: running number."""


def convert_jsonl(
    sources: Sequence[Path],
    out: Path,
    name: str,
    fields: FieldMap,
    *,
    num_validation: int = 0,
    seed: int = 0,
    prompt_suffix: str = "",
    shard_size: int = 1000,
    skip_bad: bool = False,
    overwrite: bool = False,
) -> WrittenDomain:
    """Write ``<out>/<name>-train-NNNNNN.tar`` and, if asked for, ``<name>-validation-NNNNNN.tar``.

    Order is kept. Validation takes ``num_validation`` distinct prompts, chosen by a hash of (seed, prompt);
    lines that repeat one of these prompts go nowhere else. Lines are read twice, never held together.

    Raises DataError with file and line number: not JSON, missing field, wrong type, unknown verifier
    (``skip_bad``: such lines are skipped, counted and logged); no usable line; shards that exist already.
    """
    ranked: set[str] = set()
    for sample in _samples(sources, fields, prompt_suffix, skip_bad, log=True):
        ranked.add(_rank(seed, sample))
    if not ranked:
        raise DataError(f"no usable line in {', '.join(map(str, sources))}. Check files and field names.")
    if not 0 <= num_validation < len(ranked):
        raise DataError(
            f"{num_validation} validation prompts of {len(ranked)} distinct usable prompts leave none to "
            "train on. Ask for fewer, or check the source."
        )
    chosen = set(sorted(ranked)[:num_validation])
    counts = {"train": 0, "validation": 0}

    def part(split: str) -> Iterator[NewSample]:
        taken: set[str] = set()
        for sample in _samples(sources, fields, prompt_suffix, skip_bad, log=False):
            rank = _rank(seed, sample)
            if (rank in chosen) != (split == "validation") or rank in taken:
                continue
            if split == "validation":
                taken.add(rank)
            counts[split] += 1
            yield sample

    train = write_shards(part("train"), out, f"{name}-train", shard_size=shard_size, overwrite=overwrite)
    validation = []
    if chosen:
        validation = write_shards(
            part("validation"), out, f"{name}-validation", shard_size=shard_size, overwrite=overwrite
        )
    return WrittenDomain(
        train=train, validation=validation, num_train=counts["train"], num_validation=counts["validation"]
    )


def _rank(seed: int, sample: NewSample) -> str:
    text = json.dumps([seed, sample.prompt], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _samples(
    sources: Sequence[Path], fields: FieldMap, suffix: str, skip_bad: bool, *, log: bool
) -> Iterator[NewSample]:
    skipped = 0
    for source in sources:
        try:
            lines = open(source, "rb")  # noqa: SIM115
        except OSError as error:
            raise DataError(f"{source}: cannot be read ({error.strerror}). Check path and rights.") from error
        with lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    yield _sample(line, fields, suffix, f"{source}, line {number}")
                except BadSampleError as error:
                    if not skip_bad:
                        raise
                    skipped += 1
                    if log and skipped <= 10:
                        logger.warning("skipped: %s", error)
    if log and skipped:
        logger.warning("skipped %d bad line(s) in all", skipped)


def _sample(line: bytes, fields: FieldMap, suffix: str, where: str) -> NewSample:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise BadSampleError(
            where, "not_json", f"not valid JSON ({error})", "Each line must be one JSON object."
        ) from error
    if not isinstance(row, dict):
        raise BadSampleError(
            where,
            "bad_type",
            f"is a {type(row).__name__}, not an object",
            "Each line must be one JSON object.",
        )
    record = {
        "prompt": _field(row, fields.prompt, where, "--prompt-field"),
        "answer": _field(row, fields.answer, where, "--answer-field"),
        "verifier": _field(row, fields.verifier, where, "--verifier-field", default=fields.default_verifier),
        "metadata": _field(row, fields.metadata, where, "--metadata-field", default={}),
    }
    if isinstance(record["answer"], int | float) and not isinstance(record["answer"], bool):
        record["answer"] = json.dumps(record["answer"])
    key = None if fields.key is None else str(_field(row, fields.key, where, "--key-field"))
    sample = sample_from_record(record, SampleRef(where, key or ""), where)
    try:
        registry.get(sample.verifier)
    except registry.UnknownVerifierError as error:
        raise BadSampleError(
            where, "unknown_verifier", str(error), "--verifier sets one for lines without."
        ) from error
    extra = {name: _field(row, name, where, "--keep") for name in fields.extra_metadata}
    return NewSample(
        prompt=_with_suffix(sample.prompt, suffix) if suffix else sample.prompt,
        answer=sample.answer,
        verifier=sample.verifier,
        metadata={**sample.metadata, **extra},
        key=key,
    )


def _with_suffix(prompt: Any, suffix: str) -> Any:
    if isinstance(prompt, str):
        return prompt + suffix
    last = dict(prompt[-1])
    if isinstance(last["content"], str):
        last["content"] += suffix
    else:
        last["content"] = [*last["content"], {"type": "text", "text": suffix}]
    return (*prompt[:-1], last)


_MISSING: Any = object()


def _field(row: dict[str, Any], name: str, where: str, option: str, default: Any = None) -> Any:
    """Value of a field, or of a path of fields; ``default`` unless that is None and the field missing."""
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        value = value.get(part, _MISSING) if isinstance(value, dict) else _MISSING
    if value is not _MISSING:
        return value
    if default is not None:
        return default
    raise BadSampleError(
        where, "missing_field", f"no field {name!r}; it has {sorted(row)}", f"Name the field with {option}."
    )
