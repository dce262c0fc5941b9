"""Public data sets to train and validation shards; ``public_sets.py`` knows the sets and their layouts.

Rows that cannot be used (unknown problem type, missing or broken medium, gold answer that its verifier cannot
grade) are skipped and counted by reason, and the first few of each reason are logged. Validation rows share
no image or video with training rows and, without media, no question.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from copd_megatron.data.convert.gold import GoldCheck
from copd_megatron.data.convert.media import load_medium
from copd_megatron.data.convert.public_sets import INSTRUCTIONS, LAYOUTS, Layout, PublicTask
from copd_megatron.data.convert.rows import Row, read_rows
from copd_megatron.data.convert.write import (
    NewSample,
    WrittenDomain,
    refuse_existing,
    write_domain_shards,
)
from copd_megatron.data.failures import any_failure
from copd_megatron.data.media import IMAGE, VIDEO, content_hash
from copd_megatron.errors import BadSampleError, DataError

logger = logging.getLogger(__name__)

_LOGGED_PER_REASON = 3
_GRADED_TOGETHER = 128


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What to convert and how."""

    layout: str
    """A name in ``public_sets.LAYOUTS``."""
    media_root: Path | None = None
    """The folder that the rows' paths are relative to; they may not lead out of it."""
    kind: str | None = None
    """Take only rows whose media are of this kind (``image``, ``video``); None: all rows."""
    instruction: str | None = None
    """Appended to every question; None: ``public_sets.INSTRUCTIONS``, by verifier."""
    limit: int | None = None
    """Stop after this many usable rows."""
    num_workers: int = 2
    """Processes that check gold answers."""
    timeout_seconds: float = 10.0
    """For one check."""


@dataclass(frozen=True, kw_only=True)
class PublicDomain:
    """What was written, and what was left out."""

    written: WrittenDomain
    skipped: Mapping[str, int]
    """Rows by reason."""


def convert_public(
    sources: Sequence[Path],
    out: Path,
    name: str,
    conversion: Conversion,
    *,
    num_validation: int = 0,
    seed: int = 0,
    shard_size: int = 1000,
    overwrite: bool = False,
) -> PublicDomain:
    """Write ``<out>/<name>-train-NNNNNN.tar`` and, if asked for, ``<name>-validation-NNNNNN.tar``.

    Rows are read twice, so that media are never all in memory; their order is kept. Validation takes whole
    groups of rows that share a medium (or, without media, the question), chosen by a hash of (seed, group);
    rows of the last group in excess of ``num_validation`` are left out.

    Raises DataError: unknown layout, unreadable files, no usable row, too few groups, or shards that exist.
    """
    if conversion.layout not in LAYOUTS:
        raise DataError(f"unknown layout {conversion.layout!r}. Known: {', '.join(LAYOUTS)}.")
    if not overwrite:
        refuse_existing(out, name)
    skipped: Counter[str] = Counter()
    groups = _Groups()
    usable: list[int] = []
    graded = _graded(_samples(sources, conversion, skipped), conversion, skipped)
    for number, sample in islice(graded, conversion.limit):
        groups.add(number, sample)
        usable.append(number)
    if skipped:
        logger.warning("skipped %d row(s): %s", skipped.total(), dict(skipped))
    if not usable:
        raise DataError(
            f"no usable row in {', '.join(map(str, sources))} (skipped: {dict(skipped)}). Check --layout and "
            "the media folder."
        )
    validation, left_out = groups.choose(usable, num_validation, seed)
    parts = {
        "train": [number for number in usable if number not in validation and number not in left_out],
        "validation": [number for number in usable if number in validation],
    }
    if not parts["train"]:
        raise DataError(
            f"{num_validation} validation rows leave none of {len(usable)} usable rows to train on. Ask for "
            "fewer; rows that share a medium (or, without media, the question) stay together."
        )
    if left_out:
        logger.warning(
            "left out %d row(s) that share a medium or the question with validation rows and are more than "
            "the %d asked for",
            len(left_out),
            num_validation,
        )
    train, validation_shards = write_domain_shards(
        _chosen(sources, conversion, set(parts["train"])),
        _chosen(sources, conversion, validation) if validation else None,
        out,
        name,
        shard_size=shard_size,
        overwrite=overwrite,
    )
    written = WrittenDomain(
        train=train,
        validation=validation_shards,
        num_train=len(parts["train"]),
        num_validation=len(parts["validation"]),
    )
    return PublicDomain(written=written, skipped=dict(skipped))


class _Groups:
    """Groups of rows that share a question or a medium (union-find over what identifies a row)."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}
        self._group_of: dict[int, str] = {}

    def add(self, number: int, sample: NewSample) -> None:
        # Questions repeat over different images ("What is shown?"): they identify a row only without media.
        marks = [content_hash(data) for data in sample.media.values()] or [
            content_hash(repr(sample.prompt).encode())
        ]
        for mark in marks[1:]:
            self._parent[self._root(mark)] = self._root(marks[0])
        self._group_of[number] = marks[0]

    def choose(self, numbers: Sequence[int], wanted: int, seed: int) -> tuple[set[int], set[int]]:
        """Rows for validation, and rows of the same groups that are left out."""
        members: dict[str, list[int]] = {}
        for number in numbers:
            members.setdefault(self._root(self._group_of[number]), []).append(number)
        # A union's root depends on the order of joining; the smallest member's mark does not.
        ranked = sorted(
            members.values(),
            key=lambda group: hashlib.sha256(f"{seed}/{self._group_of[group[0]]}".encode()).digest(),
        )
        chosen: list[int] = []
        for group in ranked:
            if len(chosen) >= wanted:
                break
            chosen += group
        return set(chosen[:wanted]), set(chosen[wanted:])

    def _root(self, mark: str) -> str:
        parent = self._parent.setdefault(mark, mark)
        while parent != mark:
            self._parent[mark] = self._parent[parent]
            mark, parent = parent, self._parent[parent]
        return mark


def _chosen(sources: Sequence[Path], conversion: Conversion, numbers: set[int]) -> Iterator[NewSample]:
    for number, sample in _samples(sources, conversion, None, only=numbers):
        assert number in numbers
        yield sample


def _samples(
    sources: Sequence[Path],
    conversion: Conversion,
    skipped: Counter[str] | None,
    *,
    only: set[int] | None = None,
) -> Iterator[tuple[int, NewSample]]:
    """Running number and sample of each row that can be read; ``only``: of these rows."""
    layout = LAYOUTS[conversion.layout]
    for number, (where, row) in enumerate(read_rows(sources)):
        if only is not None and number not in only:
            continue
        try:
            sample = _sample_of(row, layout, conversion, where)
        except BadSampleError as error:
            _skip(skipped, error)
            continue
        if sample is not None:
            yield number, sample


def _sample_of(
    row: Row | BadSampleError, layout: Layout, conversion: Conversion, where: str
) -> NewSample | None:
    """The sample of a row; None if it is of another kind than asked for. Raises BadSampleError."""
    if isinstance(row, BadSampleError):
        raise row
    with any_failure(where):
        task = layout(row, where)
        if conversion.kind is not None and any(m.kind != conversion.kind for m in task.media):
            return None
        return _sample(task, conversion, where)


def _skip(skipped: Counter[str] | None, error: BadSampleError) -> None:
    if skipped is None:  # counted when the rows were read first
        return
    skipped[error.reason] += 1
    if skipped[error.reason] <= _LOGGED_PER_REASON:
        logger.warning("skipped: %s", error)


def _sample(task: PublicTask, conversion: Conversion, where: str) -> NewSample:
    media: dict[str, bytes] = {}
    for kind in (IMAGE, VIDEO):
        for index, source in enumerate(item for item in task.media if item.kind == kind):
            extension, data = load_medium(source, conversion.media_root, where)
            media[f"{index}.{extension}"] = data
    for kind in (IMAGE, VIDEO):
        placed = task.question.count(f"<{kind}>")
        given = sum(source.kind == kind for source in task.media)
        if placed not in (0, given):
            raise BadSampleError(
                where, "media_mismatch", f"{placed} <{kind}> for {given} {kind}(s)", "Drop the row."
            )
    instruction = conversion.instruction
    return NewSample(
        prompt=task.question + (INSTRUCTIONS[task.verifier] if instruction is None else instruction),
        answer=task.answer,
        verifier=task.verifier,
        metadata=task.metadata,
        media=media,
    )


def _graded(
    samples: Iterator[tuple[int, NewSample]], conversion: Conversion, skipped: Counter[str]
) -> Iterator[tuple[int, NewSample]]:
    """The samples whose verifier can grade the gold answer."""
    with GoldCheck(conversion.num_workers, conversion.timeout_seconds) as check:
        while batch := list(islice(samples, _GRADED_TOGETHER)):
            problems = check.problems([sample for _, sample in batch])
            for (number, sample), problem in zip(batch, problems, strict=True):
                if problem is None:
                    yield number, sample
                    continue
                where = f"row {number} (answer {sample.answer[:40]!r}, verifier {sample.verifier})"
                _skip(skipped, BadSampleError(where, "ungradable", problem, "The row is left out."))
