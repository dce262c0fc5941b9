"""A user's own JSON lines, JSON arrays and Parquet files to shards, checked row by row.

Whatever would be lost or refused later is refused here, with file and line: an image or video that cannot be
decoded, one that no field asks for, a gold answer that its verifier cannot grade, a key that occurs twice.
Other fields that nothing asks for are left out, and a message names them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import batched
from pathlib import Path
from typing import Any

from copd_megatron.data.convert.gold import GoldCheck
from copd_megatron.data.convert.media import MediaSource, OwnMedia, check_placeholders, with_named_media
from copd_megatron.data.convert.rows import Row, lines_of_file, read_rows
from copd_megatron.data.convert.write import (
    NewSample,
    WrittenDomain,
    key_problem,
    refuse_existing,
    write_domain_shards,
)
from copd_megatron.data.failures import any_failure
from copd_megatron.data.media import content_hash
from copd_megatron.data.samples import Sample, SampleRef, check_plain, load_json, sample_from_record
from copd_megatron.errors import BadSampleError, DataError
from copd_megatron.rewards import registry
from copd_megatron.rewards.terms import WEIGHTED, read_terms

logger = logging.getLogger(__name__)

_CHECKED_TOGETHER = 128
_LOGGED_LINES = 10
_MEDIA_FIELD = re.compile(
    r"(image|img|picture|photo|video|audio|media|frame)s?(_?(path|file|url|uri|byte|data|base64|b64)s?)?",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class FieldMap:
    """Which fields of a line mean what. A name may be a path: ``reward_model.ground_truth``."""

    prompt: str = "prompt"
    answer: str = "answer"
    """Numbers are written as text."""
    verifier: str = "verifier"
    """Lines without this field use ``default_verifier``."""
    default_verifier: str | None = None
    allowed_verifiers: tuple[str, ...] = ()
    """Those that lines may name by path, ``package.module:function``; ``default_verifier`` is one."""
    metadata: str = "metadata"
    extra_metadata: tuple[str, ...] = ()
    """Further fields to keep in the sample's metadata, under their own names."""
    key: str | None = None
    """The field with the sample's key; None: a running number."""
    images: tuple[str, ...] = ("image", "images")
    """Fields with one image or several: paths, or ``{"bytes", "path"}``."""
    videos: tuple[str, ...] = ("video", "videos")
    """The same of videos."""

    @property
    def trusted(self) -> tuple[str, ...]:
        """Verifiers by path that the person who converts has given."""
        return (*self.allowed_verifiers, *([self.default_verifier] if self.default_verifier else []))

    def media(self, root: Path | None) -> OwnMedia:
        """What reads the media; fields that are kept as metadata are none."""
        kept = self.extra_metadata
        return OwnMedia(
            image_fields=tuple(name for name in self.images if name not in kept),
            video_fields=tuple(name for name in self.videos if name not in kept),
            root=root,
        )

    def asked_for(self) -> frozenset[str]:
        """All names, and paths."""
        names = [self.prompt, self.answer, self.verifier, self.metadata, *self.extra_metadata]
        names += [*self.images, *self.videos]
        names += [self.key] if self.key is not None else []
        return frozenset(names)


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
    check_golds: bool = True,
    media_root: Path | None = None,
) -> WrittenDomain:
    """Write ``<out>/<name>-train-NNNNNN.tar`` and, if asked for, ``<name>-validation-NNNNNN.tar``.

    The order of lines is kept. Validation takes ``num_validation`` distinct prompts, chosen by a hash of
    (seed, prompt), or of (seed, media) where there are any, since a question is often asked of many images;
    lines that repeat one of these are left out of the training set. Files are read twice, so that lines and
    media are never all in memory. ``check_golds``: let verifiers grade every gold answer, which takes a
    grading's time for each line. ``media_root``: the folder that paths of media start at, instead of the
    source's own.

    Raises DataError with file and line number: not JSON, missing field, wrong type, a medium that cannot be
    read or decoded or that the prompt has no place for, unknown verifier, a gold answer that cannot be
    graded, a bad key (``skip_bad``: such lines are skipped, counted and logged); no usable line; shards that
    exist already.
    """
    survey, media = _Survey(skip_bad=skip_bad), fields.media(media_root)
    ranked: set[str] = set()
    lines = _lines(sources, fields, prompt_suffix, media)
    for line, sample in survey.usable((line.without_media() for line in lines), check_golds):
        ranked.add(_rank(seed, sample, line.media_hashes))
    survey.report()
    if not ranked:
        raise DataError(f"no usable line in {', '.join(map(str, sources))}. Check files and field names.")
    if not 0 <= num_validation < len(ranked):
        raise DataError(
            f"{num_validation} validation prompts of {len(ranked)} distinct usable prompts leave none to "
            "train on. Ask for fewer, or check the source."
        )
    chosen = set(sorted(ranked)[:num_validation])
    counts = {"train": 0, "validation": 0, "repeats": 0}

    def part(split: str) -> Iterator[NewSample]:
        taken: set[str] = set()
        for line in _lines(sources, fields, prompt_suffix, media):
            if line.place in survey.bad or isinstance(line.sample, BadSampleError):
                continue
            rank = _rank(seed, line.sample, line.media_hashes)
            if split == "validation" and rank in taken:
                counts["repeats"] += 1
            if (rank in chosen) != (split == "validation") or rank in taken:
                continue
            if split == "validation":
                taken.add(rank)
            counts[split] += 1
            yield line.sample

    if not overwrite:
        refuse_existing(out, name)
    train, validation = write_domain_shards(
        part("train"),
        part("validation") if chosen else None,
        out,
        name,
        shard_size=shard_size,
        overwrite=overwrite,
    )
    if counts["repeats"]:
        logger.warning(
            "left out %d line(s) that repeat the prompt or the media of a validation sample",
            counts["repeats"],
        )
    return WrittenDomain(
        train=train, validation=validation, num_train=counts["train"], num_validation=counts["validation"]
    )


@dataclass(frozen=True, kw_only=True)
class _Line:
    """A line that is not blank, and what it says."""

    place: tuple[int, int]
    """(number of the file, number of the line)"""
    where: str
    sample: NewSample | BadSampleError
    unused: tuple[str, ...] = ()
    """Fields that hold something and that nothing asks for."""
    media_hashes: tuple[str, ...] = ()

    def without_media(self) -> _Line:
        """The same without the media's bytes, which the survey does not need."""
        if isinstance(self.sample, BadSampleError):
            return self
        return replace(self, sample=replace(self.sample, media={}))


@dataclass(kw_only=True)
class _Survey:
    """What the first reading finds out about all lines together."""

    skip_bad: bool
    bad: set[tuple[int, int]] = field(default_factory=set)
    """Places of lines that are skipped."""
    unused: Counter[str] = field(default_factory=Counter)
    _key_of: dict[str, str] = field(default_factory=dict)
    """Where each key was met first."""

    def usable(self, lines: Iterator[_Line], check_golds: bool) -> Iterator[tuple[_Line, NewSample]]:
        """The lines whose samples can be written, with these. Raises BadSampleError unless ``skip_bad``."""
        with GoldCheck(num_workers=2, timeout_seconds=10.0) as check:
            for batch in batched(lines, _CHECKED_TOGETHER):
                good = list(self._good(batch))
                samples = [sample for _, sample in good]
                problems = check.problems(samples) if check_golds else [None] * len(samples)
                for (line, sample), problem in zip(good, problems, strict=True):
                    if problem is None:
                        self.unused.update(line.unused)
                        yield line, sample
                    else:
                        self._refuse(line, _ungradable(line, sample, problem))

    def report(self) -> None:
        """Say what was left out."""
        if self.bad:
            logger.warning("skipped %d bad line(s) in all", len(self.bad))
        if self.unused:
            named = ", ".join(f"{name!r} ({count} lines)" for name, count in self.unused.most_common())
            logger.warning("left out fields that nothing asks for: %s. --keep NAME keeps one.", named)

    def _good(self, lines: Sequence[_Line]) -> Iterator[tuple[_Line, NewSample]]:
        for line in lines:
            if isinstance(line.sample, BadSampleError):
                self._refuse(line, line.sample)
            elif (problem := self._key_problem(line.sample.key, line.where)) is not None:
                remedy = "Every key must be unique; without --key-field, lines are numbered."
                self._refuse(line, BadSampleError(line.where, "bad_key", problem, remedy))
            else:
                yield line, line.sample

    def _key_problem(self, key: str | None, where: str) -> str | None:
        if key is None:
            return None
        if (problem := key_problem(key)) is not None:
            return problem
        first = self._key_of.setdefault(key, where)
        return None if first == where else f"key {key!r} occurs twice, first in {first}"

    def _refuse(self, line: _Line, error: BadSampleError) -> None:
        if not self.skip_bad:
            raise error
        self.bad.add(line.place)
        if len(self.bad) <= _LOGGED_LINES:
            logger.warning("skipped: %s", error)


def _ungradable(line: _Line, sample: NewSample, problem: str) -> BadSampleError:
    return BadSampleError(
        line.where,
        "ungradable",
        f"answer {sample.answer[:60]!r} with verifier {sample.verifier!r}: {problem}",
        "Correct the answer, or choose a verifier that understands it.",
    )


def _rank(seed: int, sample: NewSample, media_hashes: Sequence[str]) -> str:
    text = json.dumps([seed, sorted(media_hashes) or sample.prompt], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _lines(sources: Sequence[Path], fields: FieldMap, suffix: str, media: OwnMedia) -> Iterator[_Line]:
    """All lines in order. Raises DataError: a file cannot be read."""
    asked_for = fields.asked_for()
    for file_number, source in enumerate(sources):
        for number, where, raw in _raw_rows(source):
            place = (file_number, number)
            try:
                with any_failure(where):
                    row, shown, beside = _row(raw, media, where)
                    unused = tuple(_unused(row, asked_for))
                    _refuse_media(unused, where)
                    unused += beside
                    sample, named = _sample(row, fields, suffix, where)
                    if named and shown:
                        raise _named_twice(where)
                    shown = named or shown
                    check_placeholders(sample.prompt, shown, where)
                    members = media.members(shown, source, where)
                yield _Line(
                    place=place,
                    where=where,
                    sample=replace(sample, media=members),
                    unused=unused,
                    media_hashes=tuple(map(content_hash, members.values())),
                )
            except BadSampleError as error:
                yield _Line(place=place, where=where, sample=error)


def _named_twice(where: str) -> BadSampleError:
    problem = "media are named both by parts of the prompt and by fields of their own, in unclear order"
    return BadSampleError(where, "media_mismatch", problem, "Name them in one of the two ways.")


def _raw_rows(source: Path) -> Iterator[tuple[int, str, bytes | Row | BadSampleError]]:
    """Number, place in words and content of every row of a file: bytes of a line of JSON, or what a JSON
    array or Parquet file holds."""
    if source.suffix.lower() in (".parquet", ".json"):
        for number, (where, row) in enumerate(read_rows([source])):
            yield number, where, row
        return
    try:
        for line in lines_of_file(source):
            yield line.number, f"{source}, line {line.number}", line.text
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error.strerror}). Check path and rights.") from error


def _row(
    raw: bytes | Row | BadSampleError, media: OwnMedia, where: str
) -> tuple[dict[str, Any], list[MediaSource], tuple[str, ...]]:
    """A row without its media, these, and what stands beside them."""
    remedy = "Each line must be one JSON object."
    if isinstance(raw, BadSampleError):
        raise raw
    if isinstance(raw, bytes):
        row = load_json(raw, where, "not valid JSON", remedy, as_written=True)
        check_plain(row, where)
    else:
        row = dict(raw)
    if not isinstance(row, dict):
        raise BadSampleError(where, "bad_type", f"is a {type(row).__name__}, not an object", remedy)
    shown, beside = media.sources(row, where), tuple(media.beside(row))
    row = {name: value for name, value in row.items() if name not in media.fields}
    try:
        json.dumps(row, allow_nan=False)
    except ValueError as error:
        problem = "a number is infinite or not a number, which JSON does not have"
        raise BadSampleError(where, "not_json", problem, "Store it as a string or null.") from error
    except TypeError as error:
        problem = f"a field holds what JSON cannot ({error})"
        raise BadSampleError(
            where, "bad_type", problem, "Leave the column out, or store it as text."
        ) from error
    check_plain(row, where)
    return row, shown, beside


def _unused(row: dict[str, Any], asked_for: frozenset[str], prefix: str = "") -> Iterator[str]:
    """Fields that hold something and that nothing asks for, those inside of others by their paths."""
    for name, value in row.items():
        path = prefix + name
        if path in asked_for or not _holds(value):
            continue
        if isinstance(value, dict) and any(asked.startswith(f"{path}.") for asked in asked_for):
            yield from _unused(value, asked_for, f"{path}.")
        else:
            yield path


def _holds(value: Any) -> bool:
    return value not in (None, "", [], {})


def _refuse_media(unused: Sequence[str], where: str) -> None:
    media = [name for name in unused if _MEDIA_FIELD.fullmatch(name.rpartition(".")[2])]
    if media:
        raise BadSampleError(
            where,
            "media_unsupported",
            f"field(s) {', '.join(map(repr, media))} hold media, which would be lost",
            "Name them with --image-field or --video-field; audio is not supported.",
        )


def _sample(
    row: dict[str, Any], fields: FieldMap, suffix: str, where: str
) -> tuple[NewSample, list[MediaSource]]:
    """The sample without its media, and the media that parts of its prompt name."""
    prompt, named = with_named_media(_field(row, fields.prompt, where, "--prompt-field"), where)
    record = {
        "prompt": prompt,
        "answer": _field(row, fields.answer, where, "--answer-field"),
        "verifier": _verifier(row, fields, where),
        "metadata": _field(row, fields.metadata, where, "--metadata-field", default={}),
    }
    if isinstance(record["answer"], int | float) and not isinstance(record["answer"], bool):
        record["answer"] = str(record["answer"])  # as it is written: 1.10 and 1e5 stay so
    sample = sample_from_record(record, SampleRef(where, ""), where)
    try:
        for name in _verifiers(sample, where):
            registry.named_by_data(name, fields.trusted)
    except registry.UnknownVerifierError as error:
        problem = str(error).removesuffix(".")
        remedy = "--verifier NAME sets one for lines that name none."
        raise BadSampleError(where, "unknown_verifier", problem, remedy) from error
    extra = {name: _field(row, name, where, "--keep") for name in fields.extra_metadata}
    for name in extra.keys() & sample.metadata.keys():
        if extra[name] != sample.metadata[name]:
            raise BadSampleError(
                where,
                "kept_twice",
                f"field {name!r}, which --keep takes into the metadata, would replace the {name!r} there",
                "Rename one of them, or leave --keep out.",
            )
    new = NewSample(
        prompt=_with_suffix(sample.prompt, suffix) if suffix else sample.prompt,
        answer=sample.answer,
        verifier=sample.verifier,
        metadata={**sample.metadata, **extra},
        key=_key(row, fields, where),
    )
    return new, named


def _verifiers(sample: Sample, where: str) -> list[str]:
    """The verifier that a sample names, and those of its terms."""
    if sample.verifier != WEIGHTED:
        return [sample.verifier]
    try:
        return [sample.verifier, *(term.verifier for term in read_terms(sample.metadata))]
    except ValueError as error:
        problem = str(error).removesuffix(".")
        raise BadSampleError(where, "bad_terms", problem, "Correct metadata.terms.") from error


def _verifier(row: dict[str, Any], fields: FieldMap, where: str) -> Any:
    remedy = "--verifier NAME sets one for all lines without it, --verifier-field names another field."
    value = _field(row, fields.verifier, where, remedy, default=fields.default_verifier)
    return fields.default_verifier if value is None and fields.default_verifier is not None else value


def _key(row: dict[str, Any], fields: FieldMap, where: str) -> str | None:
    if fields.key is None:
        return None
    value = _field(row, fields.key, where, "--key-field")
    if isinstance(value, bool) or not isinstance(value, int | str):
        problem = f"key {value!r} in field {fields.key!r} is no text or integer"
        raise BadSampleError(where, "bad_key", problem, "Name another field with --key-field, or none.")
    return str(value)


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
    """The value of a field, or of a path of fields; ``default`` where there is none, unless that is None.

    ``option``: the command line's option that names the field, or a whole sentence.
    """
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        value = value.get(part, _MISSING) if isinstance(value, dict) else _MISSING
    if value is not _MISSING:
        return value
    if default is not None:
        return default
    remedy = f"Name the field with {option}." if " " not in option else option
    raise BadSampleError(where, "missing_field", f"no field {name!r}; it has {sorted(row)}", remedy)
