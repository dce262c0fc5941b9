"""Rows of a public data set's files: JSON arrays, JSON lines, Parquet, tables with tabs."""

from __future__ import annotations

import csv
import importlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from copd_megatron.data.failures import name_and_text
from copd_megatron.data.samples import load_json
from copd_megatron.errors import BadSampleError, DataError
from copd_megatron.untrusted.json_text import Line, lines_of
from copd_megatron.untrusted.regular_file import open_regular, read_regular

Row = Mapping[str, Any]
MAX_LINE_BYTES: Final = 1 << 28
"""Of a line, and of one value in a table with tabs; pictures in base64 are long."""
_MAX_ARRAY_BYTES: Final = 4 << 30
"""Of a JSON array, which is in memory as a whole."""
_ROWS_TOGETHER: Final = 256
_MAX_GROUP_BYTES: Final = 16 << 30
"""Of a row group of Parquet, decompressed: far more than programs write."""


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


def lines_of_file(source: Path) -> Iterator[Line]:
    """The lines of a data file that are not empty.

    Raises DataError: a line that is too long. OSError: no regular file, or it cannot be read.
    """
    with open_regular(source) as file:
        try:
            for line in lines_of(file, source, max_bytes=MAX_LINE_BYTES):
                if line.text.strip():
                    yield line
        except ValueError as error:
            raise DataError(f"{error}.") from error


def _json(source: Path) -> Iterator[tuple[str, Row | BadSampleError]]:
    content = read_regular(source, _MAX_ARRAY_BYTES)
    rows = load_json(content, str(source), "not valid JSON", "Download the file again.", as_written=True)
    if not isinstance(rows, list):
        raise DataError(f"{source}: holds a {type(rows).__name__}, not an array of rows. Give such a file.")
    for number, row in enumerate(rows):
        yield _checked(row, f"{source}, row {number}")


def _jsonl(source: Path) -> Iterator[tuple[str, Row | BadSampleError]]:
    for line in lines_of_file(source):
        where = f"{source}, line {line.number}"
        try:
            remedy = "Each line must be one object."
            row = load_json(line.text, where, "not valid JSON", remedy, as_written=True)
        except BadSampleError as error:
            yield where, error
            continue
        yield _checked(row, where)


def _tsv(source: Path) -> Iterator[tuple[str, Row | BadSampleError]]:
    csv.field_size_limit(MAX_LINE_BYTES)  # of the whole process
    with open_regular(source) as file:
        lines = (line.text.decode() for line in lines_of(file, source, max_bytes=MAX_LINE_BYTES))
        try:
            for number, row in enumerate(csv.DictReader(lines, delimiter="\t", strict=True)):
                where = f"{source}, row {number}"
                if None in row or None in row.values():
                    problem = "has another number of values than the first line has names"
                    yield where, BadSampleError(where, "bad_type", problem, "Download the file again.")
                else:
                    yield where, row
        except (csv.Error, ValueError) as error:
            raise DataError(f"{source}: not a table with tabs ({error}). Download the file again.") from error


def _parquet(source: Path) -> Iterator[tuple[str, Row | BadSampleError]]:
    """A text or picture that occurs a thousand times is one entry of a dictionary, in the file as in memory;
    and values are made row by row, so that one that Python cannot hold is a problem of its row."""
    parquet = importlib.import_module("pyarrow.parquet")  # slow to import, and no other kind needs it
    number = 0
    try:
        with open_regular(source) as opened:
            leaves = parquet.ParquetFile(opened).schema
            texts = [leaf.path for leaf in map(leaves.column, range(len(leaves))) if _is_text(leaf)]
            file = parquet.ParquetFile(opened, read_dictionary=texts)
            for group in map(file.metadata.row_group, range(file.num_row_groups)):
                if group.total_byte_size > _MAX_GROUP_BYTES:
                    problem = (
                        f"a row group has {group.total_byte_size} bytes, {_MAX_GROUP_BYTES} is the limit"
                    )
                    raise DataError(f"{source}: {problem}. Write smaller ones.")
            for batch in file.iter_batches(batch_size=_ROWS_TOGETHER):
                for place in range(batch.num_rows):
                    yield _of_batch(batch, place, f"{source}, row {number}")
                    number += 1
    except MemoryError as error:
        raise DataError(f"{source}: a part of it does not fit into memory ({error}).") from error
    except (ValueError, NotImplementedError, LookupError) as error:  # pyarrow's are of these kinds
        raise DataError(f"{source}: not readable as Parquet ({error}). Download the file again.") from error


def _is_text(leaf: Any) -> bool:
    return bool(leaf.physical_type == "BYTE_ARRAY")


def _of_batch(batch: Any, place: int, where: str) -> tuple[str, Row | BadSampleError]:
    row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = column[place].as_py()
        except (ValueError, ArithmeticError, LookupError) as error:  # a date of the year 5,881,580
            problem = f"column {name!r:.80} holds what Python cannot ({name_and_text(error)})"
            return where, BadSampleError(where, "bad_type", problem, "Leave the column out, or correct it.")
    return where, row


def _checked(row: Any, where: str) -> tuple[str, Row | BadSampleError]:
    if isinstance(row, Mapping):
        return where, row
    problem = f"is a {type(row).__name__}, not an object"
    return where, BadSampleError(where, "bad_type", problem, "Each row must be an object.")
