"""``copd checkpoint to-megatron``."""

from __future__ import annotations

from pathlib import Path

import click

from copd_megatron.cli.checkpoint.options import DTYPE
from copd_megatron.cli.group import Command
from copd_megatron.cli.output import say
from copd_megatron.cli.parameters import PATH
from copd_megatron.cli.progress import ProgressLine

EXAMPLES = """
    copd checkpoint to-megatron models/Qwen3-4B checkpoints/qwen3-4b
    copd checkpoint to-megatron models/Qwen3-4B checkpoints/qwen3-4b --dtype float32
"""


@click.command("to-megatron", cls=Command, examples=EXAMPLES)
@click.argument("source", type=PATH)
@click.argument("target", type=PATH)
@DTYPE
def command(source: Path, target: Path, dtype: str | None) -> int:
    """Write a Hugging Face folder in Megatron's format.

    The result is in Megatron's distributed format, which jobs of any layout load. SOURCE is the Hugging Face
    folder, TARGET the folder to write, which must not exist. Configuration, tokenizer and processor files
    come along, so that copd checkpoint to-hf gives the same folder back, byte for byte.
    """
    import torch

    from copd_megatron.merge.convert import hf_to_megatron

    with ProgressLine() as progress:
        hf_to_megatron(source, target, dtype=getattr(torch, dtype) if dtype else None, progress=progress)
    say(f"wrote {target}: {progress.summary()}")
    return 0
