"""``copd data jsonl-to-shards``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from copd_megatron.cli.data.options import shard_options
from copd_megatron.cli.group import Command
from copd_megatron.cli.parameters import PATH, log_plainly
from copd_megatron.data.convert.jsonl import FieldMap, convert_jsonl

EXAMPLES = """
    copd data jsonl-to-shards questions.jsonl --out data --name physics --verifier math --validation 200
    copd data jsonl-to-shards *.jsonl --out data --name physics --prompt-field question \\
        --answer-field reward_model.ground_truth --verifier math

A line of questions.jsonl:
    {"prompt": "What is 2 + 2? Put the answer into \\\\boxed{}.", "answer": "4", "verifier": "math"}
"""


@click.command("jsonl-to-shards", cls=Command, examples=EXAMPLES)
@click.argument("sources", nargs=-1, required=True, type=PATH)
@shard_options
@click.option("--prompt-field", default="prompt", show_default=True, help="Text, or a list of chat messages.")
@click.option("--answer-field", default="answer", show_default=True)
@click.option("--verifier-field", default="verifier", show_default=True)
@click.option("--verifier", help="For lines without a verifier of their own.")
@click.option("--metadata-field", default="metadata", show_default=True)
@click.option(
    "--keep", multiple=True, metavar="FIELD", help="One more field to keep in the metadata; repeatable."
)
@click.option("--key-field", help="Field with the sample's key; default: a running number.")
@click.option("--prompt-suffix", default="", help="Put after every prompt.")
@click.option("--skip-bad", is_flag=True, help="Skip and count bad lines instead of stopping.")
@click.option(
    "--check-golds/--no-check-golds",
    default=True,
    show_default=True,
    help="Let the verifiers grade every gold answer first; takes a grading's time for each line.",
)
def command(
    sources: tuple[Path, ...],
    out: Path,
    name: str,
    prompt_field: str,
    answer_field: str,
    verifier_field: str,
    verifier: str | None,
    metadata_field: str,
    keep: tuple[str, ...],
    key_field: str | None,
    **options: Any,
) -> int:
    """Turn JSON lines into shards.

    SOURCES are files with one JSON object a line. Field names may be paths, such as
    reward_model.ground_truth. Which prompts are held out for validation depends on the seed and the prompts
    alone.
    """
    log_plainly()
    fields = FieldMap(
        prompt=prompt_field,
        answer=answer_field,
        verifier=verifier_field,
        default_verifier=verifier,
        metadata=metadata_field,
        extra_metadata=keep,
        key=key_field,
    )
    written = convert_jsonl(sources, out, name, fields, **options)
    print(written.describe(out))
    return 0
