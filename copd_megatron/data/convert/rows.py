"""Rows of a public data set's files: JSON arrays, JSON lines, Parquet, tables with tabs."""

from __future__ import annotations

import csv
import importlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from copd_megatron.data.samples import load_json
from copd_megatron.errors import BadSampleError, DataError

Row = Mapping[str, Any]
_MAX_FIELD = 1 << 28
"""Characters of one value in a table with tabs."""


def read_rows(sources: Sequence[Path]) -> Iterator[tuple[str, Row | BadSampleError]]:
    """Rows of all files in order, each with the words that name its place; an error stands for a broken row.

    ``.json``: one array of objects; ``.jsonl``: an object per line; ``.parquet``; ``.tsv``: names of the
    columns in the first line, all values texts.

    Raises DataError: unreadable file, unknown extension, not an array.
    """
    for source in sources:
        readers = {".json": _json, ".jsonl": _jsonl, ".parquet": _parquet, ".tsv": _tsv}
        reader = readers.get(source.suffix.lower())
        if reader is None:
            raise DataError(f"{source}: unknown kind of file. Give {', '.join(readers)} files.")
        try:
            yield from reader(source)
        except OSError as error:
            problem = error.strerror or error
            raise DataError(f"{source}: cannot be read ({problem}). Check path and rights.") from error


def _json(source: Path) -> Iterator[tuple[str, Row | BadSampleError]]:
    rows = load_json(source.read_bytes(), str(source), "not valid JSON", "Download the file again.")
    if not isinstance(rows, list):
        raise DataError(f"{source}: holds a {type(rows).__name__}, not an array of rows. Give such a file.")
    for number, row in enumerate(rows):
        yield _checked(row, f"{source}, row {number}")


def _jsonl(source: Path) -> Iterator[tuple[str, Row | BadSampleError]]:
    with open(source, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{source}, line {number}"
            try:
                row = load_json(line, where, "not valid JSON", "Each line must be one object.")
            except BadSampleError as error:
                yield where, error
                continue
            yield _checked(row, where)


def _tsv(source: Path) -> Iterator[tuple[str, Row | BadSampleError]]:
    csv.field_size_limit(_MAX_FIELD)  # of the whole process; pictures in base64 exceed the usual one
    with open(source, encoding="utf-8", newline="") as file:
        try:
            for number, row in enumerate(csv.DictReader(file, delimiter="\t", strict=True)):
                where = f"{source}, row {number}"
                if None in row or None in row.values():
                    problem = "has another number of values than the first line has names"
                    yield where, BadSampleError(where, "bad_type", problem, "Download the file again.")
                else:
                    yield where, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{source}: not a table with tabs ({error}). Download the file again.") from error


def _parquet(source: Path) -> Iterator[tuple[str, Row | BadSampleError]]:
    parquet = importlib.import_module("pyarrow.parquet")  # slow to import, and no other kind needs it
    number = 0
    try:
        for batch in parquet.ParquetFile(source).iter_batches(batch_size=256):
            for row in batch.to_pylist():
                yield _checked(row, f"{source}, row {number}")
                number += 1
    except (ValueError, NotImplementedError, LookupError) as error:  # pyarrow's are of these kinds
        raise DataError(f"{source}: not readable as Parquet ({error}). Download the file again.") from error


def _checked(row: Any, where: str) -> tuple[str, Row | BadSampleError]:
    if isinstance(row, Mapping):
        return where, row
    problem = f"is a {type(row).__name__}, not an object"
    return where, BadSampleError(where, "bad_type", problem, "Each row must be an object.")
