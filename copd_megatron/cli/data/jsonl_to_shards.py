"""``copd data jsonl-to-shards``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from copd_megatron.cli.data.options import shard_options
from copd_megatron.cli.group import Command
from copd_megatron.cli.output import say
from copd_megatron.cli.parameters import PATH, log_plainly
from copd_megatron.data.convert.jsonl import FieldMap, convert_jsonl

EXAMPLES = """
    copd data jsonl-to-shards questions.jsonl --out data --name physics --verifier math --validation 200
    copd data jsonl-to-shards *.jsonl --out data --name physics --prompt-field question \\
        --answer-field reward_model.ground_truth --verifier math

Lines of questions.jsonl:
    {"prompt": "What is 2 + 2? Put the answer into \\\\boxed{}.", "answer": "4", "verifier": "math"}
    {"prompt": "<image>How many?", "images": ["photos/7.jpg"], "answer": "3", "verifier": "numeric"}
"""


@click.command("jsonl-to-shards", cls=Command, examples=EXAMPLES)
@click.argument("sources", nargs=-1, required=True, type=PATH)
@shard_options
@click.option("--prompt-field", default="prompt", show_default=True, help="Text, or a list of chat messages.")
@click.option("--answer-field", default="answer", show_default=True)
@click.option("--verifier-field", default="verifier", show_default=True)
@click.option("--verifier", help="For lines without a verifier of their own.")
@click.option(
    "--allow-verifier",
    multiple=True,
    metavar="MODULE:FUNCTION",
    help="One of your own that lines may name; repeatable.",
)
@click.option("--metadata-field", default="metadata", show_default=True)
@click.option(
    "--keep", multiple=True, metavar="FIELD", help="One more field to keep in the metadata; repeatable."
)
@click.option("--key-field", help="Field with the sample's key; default: a running number.")
@click.option(
    "--image-field", multiple=True, default=("image", "images"), show_default=True, help="Images; repeatable."
)
@click.option(
    "--video-field", multiple=True, default=("video", "videos"), show_default=True, help="Videos; repeatable."
)
@click.option("--media-root", type=PATH, help="Folder that paths start at; default: the source's own.")
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
    allow_verifier: tuple[str, ...],
    metadata_field: str,
    keep: tuple[str, ...],
    key_field: str | None,
    image_field: tuple[str, ...],
    video_field: tuple[str, ...],
    **options: Any,
) -> int:
    """Turn JSON lines, JSON arrays or Parquet into shards.

    SOURCES are files with one JSON object a line, .json arrays or .parquet files. Field names may be paths,
    such as reward_model.ground_truth. Images and videos are files whose paths start at the source's folder;
    each is decoded once. <image> and <video> in the prompt say where they go; without any they go in front.
    In chat messages, parts may name them: {"type": "image", "image": "a.png"}. Which prompts are held out for
    validation depends on the seed and the prompts or media alone.
    """
    log_plainly()
    fields = FieldMap(
        prompt=prompt_field,
        answer=answer_field,
        verifier=verifier_field,
        default_verifier=verifier,
        allowed_verifiers=allow_verifier,
        metadata=metadata_field,
        extra_metadata=keep,
        key=key_field,
        images=image_field,
        videos=video_field,
    )
    written = convert_jsonl(sources, out, name, fields, **options)
    say(written.describe(out))
    return 0
