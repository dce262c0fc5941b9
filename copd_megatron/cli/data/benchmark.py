"""``copd data benchmark``."""

from __future__ import annotations

from pathlib import Path

import click

from copd_megatron.cli.group import Command
from copd_megatron.cli.output import say
from copd_megatron.cli.parameters import PATH, log_plainly
from copd_megatron.data.convert.benchmarks.table import BENCHMARKS
from copd_megatron.data.convert.benchmarks.write import convert_benchmark

EXAMPLES = """
    copd data benchmark math500 test.jsonl --out data
    copd data benchmark aime25 aime2025-I.jsonl aime2025-II.jsonl --out data
    copd data benchmark mmmu mmmu/*/validation-*.parquet --out data
    copd data benchmark mvbench mvbench/json/*.json --media-root mvbench/video --out data
    copd eval my.yaml base merged --by subject branches.text.data.validation='[data/math500-validation-*.tar]'
"""


@click.command("benchmark", cls=Command, examples=EXAMPLES)
@click.argument("name", type=click.Choice(sorted(BENCHMARKS)))
@click.argument("sources", nargs=-1, required=True, type=PATH)
@click.option("--out", type=PATH, required=True, help="Folder for the shards.")
@click.option("--media-root", type=PATH, help="Folder that paths of media start at; default: the file's.")
@click.option("--overwrite", is_flag=True, help="Replace shards of this benchmark.")
def command(name: str, sources: tuple[Path, ...], out: Path, media_root: Path | None, overwrite: bool) -> int:
    """Turn a published benchmark into validation shards.

    SOURCES are the .json, .jsonl, .parquet or .tsv files of its test split, as they are published. What is
    not exactly the benchmark (another number of questions, other fields, a picture that cannot be decoded, an
    answer that cannot be graded) is refused. The layouts and what is scored:
    copd_megatron/data/convert/benchmarks/table.py.
    """
    log_plainly()
    paths = convert_benchmark(name, sources, out, media_root=media_root, overwrite=overwrite)
    benchmark = BENCHMARKS[name]
    say(f"{benchmark.count} questions in {len(paths)} shard(s): {out / name}-validation-*.tar")
    if benchmark.num_generations > 1:
        say(
            f"measure it with evaluation.num_generations_per_prompt={benchmark.num_generations} "
            "evaluation.temperature=1"
        )
    return 0
