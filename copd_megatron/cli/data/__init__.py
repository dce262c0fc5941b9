"""``copd data``: the commands that write shards, and the one that measures their difficulty."""

from __future__ import annotations

import click

from copd_megatron.cli.group import LazyGroup

EXAMPLES = """
    copd data jsonl-to-shards questions.jsonl --out data --name physics --verifier math --validation 200
    copd data convert --layout polaris polaris.jsonl --out data --name text --validation 500
    copd data make-text --out data --name sums --family chain_sum --train 4000 --validation 200
    copd data make-visual --list
    copd data difficulty my.yaml --domain text --out data/text-pass-rates.jsonl
"""

MODULES = {
    "jsonl-to-shards": "copd_megatron.cli.data.jsonl_to_shards",
    "convert": "copd_megatron.cli.data.convert",
    "benchmark": "copd_megatron.cli.data.benchmark",
    "make-text": "copd_megatron.cli.data.make_text",
    "make-visual": "copd_megatron.cli.data.make_visual",
    "difficulty": "copd_megatron.cli.data.difficulty",
}


@click.group("data", cls=LazyGroup, modules=MODULES, examples=EXAMPLES)
def command() -> None:
    """Write shards of prompts, and measure how hard they are.

    They come from your files, public sets, or procedural tasks. A shard is a webdataset tar file:
    NAME-train-000000.tar and so on, NAME-validation-000000.tar. A sample
    has a prompt, an answer, the verifier that compares a response with it, and metadata for that verifier.
    """
