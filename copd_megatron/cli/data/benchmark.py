"""``copd data benchmark``."""

from __future__ import annotations

from pathlib import Path

import click

from copd_megatron.cli.group import Command
from copd_megatron.cli.parameters import PATH, log_plainly
from copd_megatron.data.convert.benchmarks import BENCHMARKS, convert_benchmark

EXAMPLES = """
    copd data benchmark math500 test.jsonl --out data
    copd data benchmark aime25 aime2025-I.jsonl aime2025-II.jsonl --out data
    copd eval my.yaml base merged --by subject branches.text.data.validation='[data/math500-validation-*.tar]'
"""


@click.command("benchmark", cls=Command, examples=EXAMPLES)
@click.argument("name", type=click.Choice(sorted(BENCHMARKS)))
@click.argument("sources", nargs=-1, required=True, type=PATH)
@click.option("--out", type=PATH, required=True, help="Folder for the shards.")
@click.option("--overwrite", is_flag=True, help="Replace shards of this benchmark.")
def command(name: str, sources: tuple[Path, ...], out: Path, overwrite: bool) -> int:
    """Turn a published benchmark into validation shards.

    SOURCES are the .json, .jsonl or .parquet files of its test split, as they are published. What is not
    exactly the benchmark (another number of problems, other fields, an answer that cannot be graded) is
    refused.
    """
    log_plainly()
    paths = convert_benchmark(name, sources, out, overwrite=overwrite)
    print(f"{BENCHMARKS[name].count} problems: {', '.join(map(str, paths))}")
    return 0
