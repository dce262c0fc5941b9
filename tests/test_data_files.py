"""Files of rows that are not what they seem: odd values, lines and values without end."""

from __future__ import annotations

import importlib
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from copd_megatron.data.convert.jsonl import FieldMap, convert_jsonl
from copd_megatron.data.convert.rows import read_rows
from copd_megatron.errors import BadSampleError
from tests.support.commands import environment


def parquet_of(path: Path, **columns: Any) -> Path:
    """A file of these columns, values that repeat stored once."""
    table = importlib.import_module("pyarrow").table(columns)
    importlib.import_module("pyarrow.parquet").write_table(table, path, compression="zstd")
    return path


def test_a_value_that_python_cannot_hold_is_a_problem_of_its_row(tmp_path: Path) -> None:
    """A date beyond the year 9999, text that is no Unicode, a time zone that nobody knows."""
    arrow = importlib.import_module("pyarrow")
    far = arrow.array([None, 2**31 - 1, None], arrow.date32())
    raw = arrow.array([b"fine", b"fine", b"\xff\xfe"], arrow.binary())
    text = arrow.Array.from_buffers(arrow.string(), 3, raw.buffers())
    source = parquet_of(
        tmp_path / "a.parquet", prompt=["p0", "p1", "p2"], answer=["a"] * 3, day=far, note=text
    )
    assert [type(row) for _, row in read_rows([source])] == [dict, BadSampleError, BadSampleError]
    fields = FieldMap(default_verifier="exact")
    with pytest.raises(BadSampleError, match=r"a\.parquet, row 1: .*'day'"):
        convert_jsonl([source], tmp_path / "out", "mine", fields)
    nowhere = arrow.array([0], arrow.timestamp("us", tz="Nowhere/City"))
    ((_, row),) = read_rows([parquet_of(tmp_path / "b.parquet", prompt=["p"], when=nowhere)])
    assert isinstance(row, BadSampleError) and "'when'" in str(row)


def test_rows_of_parquet_are_those_that_were_written(tmp_path: Path) -> None:
    """Of every batch, nested and empty values included."""
    rows = [
        {
            "prompt": f"p{n % 7}",
            "number": n,
            "nested": {"a": [f"x{n % 3}"] * (n % 4)},
            "picture": bytes([n % 256]),
        }
        for n in range(600)
    ]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    columns["empty"] = [None] * 600
    found = [row for _, row in read_rows([parquet_of(tmp_path / "a.parquet", **columns)])]
    assert found == [{**row, "empty": None} for row in rows]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "tsv", "json"])
def test_no_data_file_takes_all_memory(kind: str, tmp_path: Path) -> None:
    """In a process with little memory: 500 rows with one long text, which the file holds once, are read; a
    file of 100 GB without data is refused."""
    source = tmp_path / f"a.{kind}"
    if kind == "parquet":
        arrow = importlib.import_module("pyarrow")
        values = arrow.DictionaryArray.from_arrays(arrow.array([0] * 500, arrow.int32()), ["x" * (8 << 20)])
        parquet_of(source, prompt=values)
        assert source.stat().st_size < 100_000
    else:
        with source.open("wb") as file:
            file.truncate(100 << 30)
    code = (
        "import sys; from pathlib import Path; from copd_megatron.data.convert.rows import read_rows\n"
        "from copd_megatron.errors import DataError\n"
        "try: print(sum(1 for _ in read_rows([Path(sys.argv[1])])))\n"
        "except DataError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(source)], capture_output=True, text=True, timeout=120,
        env=environment(), preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30)),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "500" if kind == "parquet" else source.name in done.stdout
