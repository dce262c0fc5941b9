"""Public data sets to train and validation shards: see ``layouts.py`` for the sets and their layouts.

Rows that cannot be used (unknown problem type, missing or broken medium, gold answer that its verifier does
not grade) are skipped, counted by reason, and the first of each reason are logged. Validation rows share no
image or video with training rows, and those without media no question.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from PIL import Image

from copd_megatron.data.convert.public_sets import INSTRUCTIONS, LAYOUTS, MediaSource, PublicTask
from copd_megatron.data.convert.rows import read_rows
from copd_megatron.data.convert.write import NewSample, WrittenDomain, existing_shards, write_shards
from copd_megatron.data.media import IMAGE, VIDEO, content_hash, kind_of
from copd_megatron.errors import BadSampleError, DataError
from copd_megatron.rewards import registry
from copd_megatron.rewards.isolation import Call, Outcome, WorkerPool

logger = logging.getLogger(__name__)

_LOGGED_PER_REASON = 3
_GRADED_TOGETHER = 128
_STORED_AS_IS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}
_NO_ANSWER = "Answer: none of what is sought"


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What to convert and how."""

    layout: str
    """Name in ``layouts.LAYOUTS``."""
    media_root: Path | None = None
    """Folder that the rows' paths are relative to."""
    kind: str | None = None
    """Take only rows whose media are of this kind (``image``, ``video``); None: all."""
    instruction: str | None = None
    """Put after every question; None: ``layouts.INSTRUCTIONS``, by verifier."""
    limit: int | None = None
    """Stop after so many usable rows."""
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

    Rows are read twice, media never held together. Order is kept. Validation is filled with whole groups of
    rows that share a medium (or, without media, the question), chosen by a hash of (seed, group); what
    exceeds ``num_validation`` of the last group goes nowhere.

    Raises DataError: unknown layout, unreadable files, no usable row, too few groups, shards that exist.
    """
    if conversion.layout not in LAYOUTS:
        raise DataError(f"unknown layout {conversion.layout!r}. Known: {', '.join(LAYOUTS)}.")
    for split in ("train", "validation") if num_validation else ("train",):
        if existing_shards(out, f"{name}-{split}") and not overwrite:
            raise DataError(f"{out} already holds {name}-{split}-*.tar. Choose another name or overwrite.")
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
            "fewer; rows that share a medium or, without media, the question stay together."
        )
    paths = {
        split: write_shards(
            _chosen(sources, conversion, set(numbers)),
            out,
            f"{name}-{split}",
            shard_size=shard_size,
            overwrite=overwrite,
        )
        for split, numbers in parts.items()
        if numbers
    }
    written = WrittenDomain(
        train=paths["train"],
        validation=paths.get("validation", []),
        num_train=len(parts["train"]),
        num_validation=len(parts["validation"]),
    )
    return PublicDomain(written=written, skipped=dict(skipped))


class _Groups:
    """Rows that share a question or a medium, joined (union-find over what identifies each)."""

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
        """Rows for validation, and rows of the same groups that go nowhere."""
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
            if isinstance(row, BadSampleError):
                raise row
            task = layout(row, where)
            if conversion.kind is not None and any(m.kind != conversion.kind for m in task.media):
                continue
            yield number, _sample(task, conversion, where)
        except BadSampleError as error:
            _skip(skipped, error)


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
            extension, data = _load(source, conversion.media_root, where)
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


def _load(source: MediaSource, root: Path | None, where: str) -> tuple[str, bytes]:
    """Extension and bytes of a medium; images in other formats than PNG, JPEG and WebP become PNG."""
    data = source.data
    if data is None:
        assert source.path is not None
        path = (root or Path()) / source.path
        try:
            data = path.read_bytes()
        except OSError as error:
            raise BadSampleError(
                where,
                "missing_media",
                f"{source.kind} {path} cannot be read ({error.strerror})",
                "Unpack the set's archives and name their folder with --media-root.",
            ) from error
        if source.kind == VIDEO:
            extension = path.suffix.lstrip(".").lower()
            if kind_of(extension) != VIDEO:
                raise BadSampleError(
                    where, "unknown_format", f"video {path} has extension {extension!r}", "Store it as MP4."
                )
            return extension, data
    if source.kind == VIDEO:
        return "mp4", data
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.format in _STORED_AS_IS:
                image.verify()
                return _STORED_AS_IS[image.format], data
            buffer = io.BytesIO()
            image.convert("RGBA" if image.has_transparency_data else "RGB").save(buffer, format="PNG")
            return "png", buffer.getvalue()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadSampleError(
            where, "corrupt_image", f"the image cannot be opened ({error})", "Drop the row."
        ) from error


def _graded(
    samples: Iterator[tuple[int, NewSample]], conversion: Conversion, skipped: Counter[str]
) -> Iterator[tuple[int, NewSample]]:
    """The samples whose verifier grades the gold answer 1 and another answer at all."""
    pool = WorkerPool(conversion.num_workers, conversion.timeout_seconds)
    try:
        while batch := list(islice(samples, _GRADED_TOGETHER)):
            outcomes = _grade([sample for _, sample in batch], pool)
            for index, (number, sample) in enumerate(batch):
                problem = _problem_of(*outcomes[index])
                if problem is None:
                    yield number, sample
                    continue
                where = f"row {number} (answer {sample.answer[:40]!r}, verifier {sample.verifier})"
                _skip(skipped, BadSampleError(where, "ungradable", problem, "The row is left out."))
    finally:
        pool.close()


def _grade(samples: Sequence[NewSample], pool: WorkerPool) -> list[tuple[Outcome, Outcome]]:
    """Per sample, what its verifier says of the gold answer and of none."""
    calls: list[Call] = []
    outcomes: dict[tuple[int, int], Outcome] = {}
    far: list[tuple[int, int]] = []
    for index, sample in enumerate(samples):
        verifier = registry.get(sample.verifier)
        for turn, response in enumerate((f"Answer: {sample.answer}", _NO_ANSWER)):
            if verifier.isolated:
                far.append((index, turn))
                calls.append(
                    Call(
                        target=verifier.target,
                        response=response,
                        answer=sample.answer,
                        metadata=sample.metadata,
                    )
                )
                continue
            try:
                value = verifier.verify(response, sample.answer, sample.metadata)
                outcomes[index, turn] = Outcome(value=float(value))
            except ValueError as error:  # what a verifier raises for gold answers it cannot use
                outcomes[index, turn] = Outcome(reason="error", message=str(error))
    outcomes |= dict(zip(far, pool.run(calls), strict=True))
    return [(outcomes[index, 0], outcomes[index, 1]) for index in range(len(samples))]


def _problem_of(gold: Outcome, other: Outcome) -> str | None:
    """Why an answer cannot be graded; None if it can."""
    for outcome in (gold, other):
        if outcome.value is None:
            return f"the verifier fails on it ({outcome.reason}: {outcome.message})"
    if gold.value is not None and gold.value < 1.0:
        return f"the verifier grades the gold answer {gold.value:g}"
    return None
