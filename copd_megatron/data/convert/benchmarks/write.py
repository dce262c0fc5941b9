"""A published benchmark to validation shards.

A benchmark is only one if it is whole: another number of questions, a field that is missing or empty, a
picture or video that cannot be decoded, an answer that the verifier cannot grade are errors, never skipped
rows.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import batched
from pathlib import Path

from copd_megatron.data.convert.benchmarks.layout import Layout
from copd_megatron.data.convert.benchmarks.table import BENCHMARKS, Benchmark
from copd_megatron.data.convert.gold import GoldCheck
from copd_megatron.data.convert.media import OwnMedia, check_placeholders
from copd_megatron.data.convert.public_sets import INSTRUCTIONS
from copd_megatron.data.convert.rows import read_rows
from copd_megatron.data.convert.write import NewSample, existing_shards, write_shards
from copd_megatron.data.failures import any_failure
from copd_megatron.errors import BadSampleError, DataError
from copd_megatron.untrusted.visible import visible

_GRADED_TOGETHER = 512
_TEXT_SHARD, _MEDIA_SHARD = 1000, 200
"""Questions in a shard."""


def convert_benchmark(
    name: str,
    sources: Sequence[Path],
    out: Path,
    *,
    media_root: Path | None = None,
    overwrite: bool = False,
    num_workers: int = 2,
) -> list[Path]:
    """Writes ``<out>/<name>-validation-000000.tar`` and so on, all questions in the order of the files.

    The files are read twice, so that media are never all in memory.

    Args:
        name: a key of ``BENCHMARKS``.
        sources: its .json, .jsonl, .parquet or .tsv files.
        media_root: the folder that paths of media start at; None: the folder of the file with the path.

    Raises:
        DataError: it is not that benchmark: a wrong number of questions, or, with file and line, a missing
            field, a medium that cannot be decoded, an answer that cannot be graded; or the shards exist.
    """
    benchmark, prefix = BENCHMARKS[name], f"{name}-validation"
    if not overwrite and existing_shards(out, prefix):
        raise DataError(f"{out} already holds {prefix}-*.tar. Choose another folder, or overwrite them.")
    media = OwnMedia(root=media_root)
    found = [
        (where, replace(sample, media={k: hashlib.sha256(m).digest() for k, m in sample.media.items()}))
        for where, sample in _samples(name, benchmark.layout, sources, media)
    ]
    _check_whole(name, benchmark, [sample for _, sample in found], sources)
    _check_golds(found, num_workers)
    return write_shards(
        (sample for _, sample in _samples(name, benchmark.layout, sources, media)),
        out,
        prefix,
        shard_size=_MEDIA_SHARD if any(sample.media for _, sample in found) else _TEXT_SHARD,
        overwrite=overwrite,
    )


def _samples(
    name: str, layout: Layout, sources: Sequence[Path], media: OwnMedia
) -> Iterator[tuple[str, NewSample]]:
    """The place in words and the sample of each row. Raises BadSampleError at the first bad one."""
    for source in sources:
        for place, row in read_rows([source]):
            where = f"{name}, {place}"
            if isinstance(row, BadSampleError):
                raise row
            with any_failure(where):
                task = layout(row, source, where)
                check_placeholders(task.question, task.media, where)
                yield (
                    where,
                    NewSample(
                        prompt=task.question + INSTRUCTIONS[task.verifier],
                        answer=task.answer,
                        verifier=task.verifier,
                        metadata={"benchmark": name, **task.metadata},
                        media=media.members(task.media, source, where),
                    ),
                )


def _check_whole(
    name: str, benchmark: Benchmark, samples: Sequence[NewSample], sources: Sequence[Path]
) -> None:
    """Raises DataError unless the samples are as many as the benchmark has, each of them once. Media are
    digests."""
    files = f"{sources[0]} and {len(sources) - 1} more" if len(sources) > 2 else ", ".join(map(str, sources))
    remedy = "Give all files of the split that is measured, each once, and no others."
    if len(samples) != benchmark.count:
        raise DataError(f"{files}: {len(samples)} questions; {name} has {benchmark.count}. {remedy}")
    if benchmark.identity:
        names = Counter(tuple(str(s.metadata.get(key)) for key in benchmark.identity) for s in samples)
        (most, times) = names.most_common(1)[0]
        if times > 1:
            said = ", ".join(f"{key} {value}" for key, value in zip(benchmark.identity, most, strict=True))
            raise DataError(f"{files}: {said} occurs {times} times in {name}. {remedy}")
    else:
        contents = Counter((str(s.prompt), tuple(sorted(s.media.items()))) for s in samples)
        (content, times) = contents.most_common(1)[0]
        repeats = len(samples) - len(contents)
        if repeats > benchmark.max_repeats:
            raise DataError(
                f"{files}: {repeats} questions of {name} occur before, {visible(content[0][:80])!r} occurs "
                f"{times} times. {remedy}"
            )
    for key, number in benchmark.parts.items():
        sizes = Counter(str(sample.metadata.get(key)) for sample in samples)
        expected = benchmark.count // number
        wrong = [f"{value} ({size})" for value, size in sorted(sizes.items()) if size != expected]
        if wrong:
            raise DataError(
                f"{files}: {name} has {expected} questions of each {key}, but here it is "
                f"{', '.join(wrong)}. {remedy}"
            )


def _check_golds(found: Sequence[tuple[str, NewSample]], num_workers: int) -> None:
    """Raises DataError at the first gold answer that its verifier cannot grade."""
    with GoldCheck(num_workers, timeout_seconds=10.0) as check:
        for part in batched(found, _GRADED_TOGETHER):
            problems = check.problems([sample for _, sample in part])
            for (where, sample), problem in zip(part, problems, strict=True):
                if problem is not None:
                    raise DataError(
                        f"{where}: answer {sample.answer[:60]!r}, verifier {sample.verifier!r}: {problem}. "
                        "Give the files as they are published; if they are, the verifier has to learn this "
                        "answer."
                    )
