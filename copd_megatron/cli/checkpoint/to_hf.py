"""``copd checkpoint to-hf``."""

from __future__ import annotations

from pathlib import Path

import click

from copd_megatron.cli.checkpoint.options import DTYPE
from copd_megatron.cli.group import Command
from copd_megatron.cli.output import say
from copd_megatron.cli.parameters import PATH, Size
from copd_megatron.cli.progress import ProgressLine

EXAMPLES = """
    copd checkpoint to-hf runs/copd/checkpoints/step_000100/text exported/text
    copd checkpoint to-hf checkpoints/qwen3-4b back --dtype bfloat16
"""


@click.command("to-hf", cls=Command, examples=EXAMPLES)
@click.argument("source", type=PATH)
@click.argument("target", type=PATH)
@click.option(
    "--model",
    type=PATH,
    help="Hugging Face folder with config.json and tokenizer; default: the one that the checkpoint names.",
)
@DTYPE
@click.option(
    "--shard-bytes",
    type=Size(),
    help="Largest file, such as 2GiB, where the model's folder gives none; default: 4 GiB.",
)
def command(
    source: Path, target: Path, model: Path | None, dtype: str | None, shard_bytes: int | None
) -> int:
    """Write a checkpoint as a Hugging Face folder.

    SOURCE is in Megatron's distributed format: a branch's folder in a joint checkpoint, saved at any layout,
    or a folder that copd checkpoint to-megatron wrote. TARGET is the folder to write; it must not exist.
    """
    import torch

    from copd_megatron.merge.convert import SHARD_BYTES, megatron_to_hf

    with ProgressLine() as progress:
        megatron_to_hf(
            source,
            target,
            model_path=model,
            dtype=getattr(torch, dtype) if dtype else None,
            shard_bytes=shard_bytes or SHARD_BYTES,
            progress=progress,
        )
    say(f"wrote {target}: {progress.summary()}")
    return 0
