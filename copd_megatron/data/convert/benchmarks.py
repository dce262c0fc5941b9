"""Published mathematics benchmarks, from the files that their authors publish, to validation shards.

A benchmark is only one if it is whole: another number of problems, a field that is missing or empty, an
answer that the verifier cannot grade are errors, never skipped rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from copd_megatron.data.convert.gold import GoldCheck
from copd_megatron.data.convert.public_sets import INSTRUCTIONS
from copd_megatron.data.convert.rows import Row, read_rows
from copd_megatron.data.convert.write import NewSample, write_shards
from copd_megatron.errors import BadSampleError, DataError

_VERIFIER = "math"


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One benchmark and the layouts in which it is published."""

    count: int
    """Problems that it has."""
    question: tuple[str, ...] = ("problem",)
    """Names of the field with the problem; a file has one of them."""
    answer: tuple[str, ...] = ("answer",)
    kept: tuple[str, ...] = ()
    """Fields that become metadata where a file has them: ``copd eval --by`` groups by them."""


BENCHMARKS: dict[str, Benchmark] = {
    "aime24": Benchmark(
        count=30, question=("problem", "Problem"), answer=("answer", "Answer"), kept=("id", "ID")
    ),
    "aime25": Benchmark(count=30, question=("problem", "question"), kept=("id",)),
    "hmmt25": Benchmark(count=30, kept=("problem_idx", "problem_type")),
    "math500": Benchmark(count=500, kept=("subject", "level", "unique_id")),
    "minerva": Benchmark(count=272, question=("question", "problem")),
}
"""By the name that its shards get. Layouts of the usual Hugging Face repositories: AIME 2024 and 2025 (in one
file or in two of fifteen), HMMT February 2025, MATH-500, Minerva."""


def convert_benchmark(
    name: str, sources: Sequence[Path], out: Path, *, overwrite: bool = False, num_workers: int = 2
) -> list[Path]:
    """Writes ``<out>/<name>-validation-000000.tar``, all problems in the order of the files.

    Args:
        name: a key of ``BENCHMARKS``.
        sources: its .json, .jsonl or .parquet files.

    Raises:
        DataError: it is not that benchmark: a wrong number of problems, or, with file and line, a missing
            field or an answer that cannot be graded; or the shards exist.
    """
    benchmark = BENCHMARKS[name]
    samples = [_sample(row, where, name, benchmark) for where, row in read_rows(sources)]
    if len(samples) != benchmark.count:
        raise DataError(
            f"{', '.join(map(str, sources))}: {len(samples)} problems; {name} has {benchmark.count}. Give "
            "all files of its test split, and no others."
        )
    with GoldCheck(num_workers, timeout_seconds=10.0) as check:
        for number, problem in enumerate(check.problems(samples)):
            if problem is not None:
                answer = samples[number].answer
                raise DataError(f"{name}, problem {number}: answer {answer[:60]!r}: {problem}.")
    return write_shards(samples, out, f"{name}-validation", overwrite=overwrite)


def _sample(row: Row | BadSampleError, where: str, name: str, benchmark: Benchmark) -> NewSample:
    if isinstance(row, BadSampleError):
        raise row
    return NewSample(
        prompt=_text(row, benchmark.question, where, name) + INSTRUCTIONS[_VERIFIER],
        answer=_text(row, benchmark.answer, where, name),
        verifier=_VERIFIER,
        metadata={"benchmark": name, **{k: row[k] for k in benchmark.kept if row.get(k) is not None}},
    )


def _text(row: Row, names: Sequence[str], where: str, benchmark: str) -> str:
    """The field of one of these names. Numbers are written as text."""
    value = next((row[name] for name in names if name in row), None)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise BadSampleError(
            where,
            "missing_field",
            f"{benchmark} needs text in {' or '.join(map(repr, names))}; the row has {sorted(row)}",
            "Give the files as they are published.",
        )
    return value.strip()
